"""Entry point of ``cdistill``, ``python -m cdistill`` and ``accelerate launch cdistill`` (a folder is run)."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not __package__ and sys.path and Path(sys.path[0]).resolve() == _HERE:
    sys.path[0] = str(_HERE.parent)  # run as a folder: the package's parent belongs on the path, not its inside


def main() -> None:
    """Runs the command line."""
    if sys.platform == "win32":
        sys.exit("error: cdistill runs on Linux and macOS; on Windows, run it in WSL 2")
    from cdistill.runtime.signals import follow_launcher
    from cdistill.runtime.streams import install

    follow_launcher()
    install()
    from cdistill.cli.app import run
    from cdistill.runtime.processes import calm_threads, end

    calm_threads()
    end(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
