"""``python -m demo``."""

import signal


def _main() -> None:
    # What is imported takes seconds. Until the demonstration listens to Ctrl-C itself, it ends as any command does.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from demo.command import main

    main()


if __name__ == "__main__":
    _main()
