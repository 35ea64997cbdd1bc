"""One safetensors file under the published names: python launch/export.py RUN --output FOLDER"""

from __future__ import annotations

import argparse
import sys

from miles_fast.export.run import export_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a run, or one of its checkpoints (any ZeRO stage)")
    parser.add_argument(
        "--output", required=True, help="folder for model.safetensors, model.json, tokenizer/"
    )
    options = parser.parse_args()
    print(export_run(options.source, options.output) / "model.safetensors")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
