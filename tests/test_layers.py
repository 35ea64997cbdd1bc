"""The layering of the packages, and what may not be imported where."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A module may import from its own layer and from earlier ones.
LAYERS = [
    "kernels",
    "files",
    "config",
    "config_tree",
    "options",
    "distributed",
    "models",
    "data",
    "training",
    "evaluation",
    "export",
]
# Its classes derive from transformers': it is imported by whoever wants them, and lazily by everyone else.
DERIVED = {"hugging_face.py": "transformers"}
OPTIONAL = {
    "nvidia": 1,
    "webdataset": 3,
    "deepspeed": 2,
    "flash_attn": 1,
    "timm": 1,
    "transformers": 4,
    "s3fs": 1,
    "botocore": 1,
    "aiohttp": 1,
    "onnx": 1,
    "onnxruntime": 1,
    "faiss": 1,
    "pyarrow": 1,
}


def imports(path: Path):
    """(module, at module level) of every import statement."""
    tree = ast.parse(path.read_text())
    top = set()
    for node in tree.body:
        top.update(ast.walk(node) if isinstance(node, ast.Import | ast.ImportFrom) else ())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in top


def modules():
    yield from (ROOT / "kernels").glob("*.py")
    yield from (p for p in (ROOT / "miles_fast").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)


def layer(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def test_layers_are_one_way():
    wrong = []
    for path in modules():
        relative = path.relative_to(ROOT)
        own = "kernels" if relative.parts[0] == "kernels" else layer(relative.parts[1:])
        if own == "__init__":
            continue
        for name, _ in imports(path):
            if name.startswith("miles_fast."):
                other = layer(tuple(name.split(".")[1:]))
                if LAYERS.index(other) > LAYERS.index(own):
                    wrong.append(f"{relative} imports {name}")
    assert not wrong


def test_heavy_packages_are_imported_lazily_and_in_few_modules():
    users = {name: set() for name in OPTIONAL}
    for path in modules():
        for name, at_top in imports(path):
            package = name.split(".")[0]
            if name.endswith(".hugging_face"):
                assert not at_top, f"{path} imports {name} at module level"
            if package in users:
                users[package].add(path.name)
                lazy = not at_top or DERIVED.get(path.name) == package
                assert lazy, f"{path} imports {name} at module level"
    assert {name: len(found) <= OPTIONAL[name] for name, found in users.items()} == dict.fromkeys(
        OPTIONAL, True
    ), users


def test_kernels_does_not_hide_the_hugging_face_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import miles_fast.kernels.token_gather; from transformers import DistilBertModel"
    code = "from miles_fast.models.torchvision_cpu import repair_torchvision; repair_torchvision(); " + code
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_program_is_named_like_a_package_it_would_hide():
    hidden = {"kernels", "datasets", "profile", "tokenizers"}
    for folder in ("launch", "benchmarks", "tests"):
        assert not hidden & {path.stem for path in (ROOT / folder).rglob("*.py")}
