"""``python -m understudy.cli``: the same as the command ``understudy``."""

from understudy.cli.main import main

if __name__ == "__main__":
    main()
