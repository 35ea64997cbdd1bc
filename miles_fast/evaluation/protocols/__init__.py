"""The benchmark protocols, one small file each."""

from __future__ import annotations

from importlib import import_module

from miles_fast.evaluation.protocol import Protocol

NAMES = (
    "msrvtt_1ka",
    "msrvtt_full",
    "msvd",
    "lsmdc",
    "didemo",
    "ucf101",
    "hmdb51",
    "kinetics",
    "ssv2_mc",
    "ssv2_templates",
)


def find_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError listing the names there are."""
    if name not in NAMES:
        raise ValueError(f"--protocol {name}: expected one of {', '.join(NAMES)}")
    return import_module(f"miles_fast.evaluation.protocols.{name}").PROTOCOL
