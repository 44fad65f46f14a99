"""lm-eval's own command, with compressed folders: `python -m lowrank_kit.lm_eval --model hf --model_args ...`

Importing this package registers the checkpoint format; all else is lm-eval's, with all of its options.
"""

from __future__ import annotations


def main() -> None:
    """Hand over to lm-eval's command."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
