import pytest
import torch

from miles_fast.kernels import attention_cases, cases
from miles_fast.kernels.dispatch import INTERPRETED
from miles_fast.kernels.divided_attention import divided_attention_reference
from miles_fast.kernels.space_attention import space_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _reference(qkv, num_frames):
    return divided_attention_reference(qkv, num_frames, "space")


@pytest.mark.parametrize("case", attention_cases.SMALL, ids=lambda case: case.name)
def test_keeps_the_error_rule(case):
    assert cases.violations(case, space_attention, _reference, DEVICE) == []
