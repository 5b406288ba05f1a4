"""Check the two packages in dist/: what is in them, and that the wheel works with its own dependencies alone.

    python .ci/check_packages.py

The wheel is installed into a new virtual environment that holds links to this environment's copies of the packages
which the wheel asks for, and nothing else: to download them again would take minutes and gigabytes. pip finds out
whether all that the wheel asks for is there; imports of what it does not ask for fail, as they would for a user.
"""

import subprocess
import tarfile
import tempfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
NAME = "visual-ground"
# Not for those who build or install the package from its sources.
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")


def main() -> None:
    """Check both packages; raise AssertionError or CalledProcessError for what is wrong."""
    (wheel,), (sdist,) = ROOT.glob("dist/*.whl"), ROOT.glob("dist/*.tar.gz")
    check_contents(wheel, sdist)
    with tempfile.TemporaryDirectory() as folder:
        python = new_environment(Path(folder) / "venv")
        run(python, "-m", "pip", "install", "-q", "--no-index", str(wheel), cwd=folder)
        run(python, str(ROOT / ".ci" / "ground_tiny.py"), cwd=folder)
        run(python, "-m", "visual_ground", "--version", cwd=folder)
        run(python.parent / "visual-ground", "--version", cwd=folder)


def check_contents(wheel: Path, sdist: Path) -> None:
    """The wheel must hold the package and no more, the sdist every tracked file but those that serve CI alone."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = {name for name in listed.splitlines() if not name.startswith(NOT_IN_SDIST)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    package = {name for name in names if ".dist-info/" not in name}
    expected = {name for name in tracked if name.startswith("visual_ground/")}
    assert package == expected, f"in one of wheel and repository only: {sorted(package ^ expected)}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names), "the wheel has no LICENSE"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked <= names, f"not in the sdist: {sorted(tracked - names)}"
    extra = {name for name in names if name.startswith((".ci/", "demo/", "site/")) or name.endswith(".pyc")}
    assert not extra, f"should not be in the sdist: {sorted(extra)}"


def new_environment(folder: Path) -> Path:
    """Make a virtual environment of pip and the wheel's dependencies, all of them links; return its Python."""
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in sorted(dependencies()):
        found = distribution(name)
        assert found.files is not None, f"{name} has no list of its files"
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():  # Several distributions share the folder of a namespace.
                link.symlink_to(Path(str(found.locate_file(top))).resolve())
    return folder / "bin" / "python"


def dependencies() -> set[str]:
    """Return the names of the distributions that the package needs without extras, and theirs, and pip."""
    names: set[str] = set()
    todo = [("pip", ""), *required(NAME, "")]
    seen = set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) not in seen:
            seen.add((name, extra))
            names.add(name)
            todo += required(name, extra)
    return names


def required(name: str, extra: str) -> list[tuple[str, str]]:
    """Return the (distribution, extra) pairs that one distribution asks for here, with one of its extras or ""."""
    requirements = [Requirement(line) for line in distribution(name).requires or []]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [(canonicalize_name(r.name), its_extra) for r in wanted for its_extra in ("", *r.extras)]


def run(*command: str | Path, cwd: str) -> None:
    """Run a command in a folder, from which no file of the repository can be imported; show it first."""
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
