"""Every learning rate schedule in one picture: `uv run python -m launch.curves --out a.png`."""

import argparse
import pathlib

from analysis.curves import draw, schedules
from optim import schedules as module


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=pathlib.Path, default=pathlib.Path("schedules.png"))
    given = parser.parse_args(argv)
    if not given.out.parent.is_dir():
        parser.error(f"there is no folder {given.out.parent}")
    draw(schedules(module), given.out)
    print(given.out)


if __name__ == "__main__":
    main()
