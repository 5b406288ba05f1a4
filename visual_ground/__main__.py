"""`python -m visual_ground` is the command `visual-ground`."""

from visual_ground.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
