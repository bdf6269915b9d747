"""`python -m drsm_agent`, and the command `drsm-agent`."""

import sys


def main() -> None:
    """The command `drsm-agent`."""
    try:
        from drsm_agent.cli import main as command  # noqa: PLC0415  # so that a missing extra can be named
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        if package.startswith("drsm"):
            raise
        sys.exit(f"drsm-agent: {package} is not installed; the agent needs: pip install 'drsm[agent]'")
    command()


if __name__ == "__main__":
    main()
