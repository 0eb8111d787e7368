"""`python -m bitnet_lit.lm_eval` is the command `lm_eval` of the lm-evaluation-harness, which then knows `bitnet_lit`.

The harness finds models of other packages by the entry point `lm_eval.models`, which this package has
(pyproject.toml), and its own command is enough then. Releases up to 0.4.13 do not look for entry points. This command
registers the model and hands all arguments on, so it works with every release.
"""

from __future__ import annotations

from bitnet_lit.entry_point import leave


def _run_harness() -> None:
    from bitnet_lit.extras import needs

    with needs("lm_eval", "lm_eval"):
        # The harness registers its own models where none is registered yet, so they come first.
        import lm_eval.models  # noqa: F401
        from lm_eval.__main__ import cli_evaluate

    import bitnet_lit.inference.lm_eval_backend  # noqa: F401  # registers bitnet_lit

    cli_evaluate()


def main() -> None:
    """Run the command with the arguments in `sys.argv`."""
    leave(_run_harness)


if __name__ == "__main__":
    main()
