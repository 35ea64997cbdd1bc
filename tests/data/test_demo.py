"""The demo's data: prepared once, again only when its recipe changes."""

from miles_fast.data.demo import prepare_demo
from miles_fast.data.demo_corpus import Recipe
from miles_fast.data.shards import ShardSet
from miles_fast.models.text_encoder import load_tokenizer


def test_the_demo_is_prepared_once_and_again_for_another_recipe(tmp_path):
    prepare_demo(tmp_path, Recipe(num_train=6, num_heldout=3))
    (tar,) = (tmp_path / "frames" / "train").glob("*.tar")
    first = (tar.stat().st_mtime_ns, tar.read_bytes())
    shards = ShardSet([tar])
    assert len(shards) == 6 and len(shards[0].frame_extensions()) == 8
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.unk_token_id not in tokenizer(shards[5].captions()[0])["input_ids"]
    prepare_demo(tmp_path, Recipe(num_train=6, num_heldout=3))
    assert (tar.stat().st_mtime_ns, tar.read_bytes()) == first
    prepare_demo(tmp_path, Recipe(num_train=7, num_heldout=3))
    assert len(ShardSet([tar])) == 7
    assert len(ShardSet(list((tmp_path / "frames" / "heldout").glob("*.tar")))) == 3
