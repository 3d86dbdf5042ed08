"""Check files for an index: what is in them, and that an installed wheel runs the README's first example.

``make dist`` calls ``python tests/support/distribution.py dist``. That process has the standard library alone.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNEL = "polyak/kernels/_cpu.so"
SOURCES = ("cpu.c", "fingerprint.c", "lerp.h")
NATIVE_TAG = re.compile(r"manylinux_2_(\d+)_(x86_64|aarch64)")


def version() -> str:
    """Return the version that is written in the package, without importing it."""
    text = (ROOT / "src/polyak/__init__.py").read_text(encoding="utf-8")
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def wheel_faults(path: Path) -> list[str]:
    """Return what is wrong with a wheel.

    Args:
        path: A pure wheel, or one with the kernel.
    """
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = f"polyak-{version()}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        tags = Parser().parsestr(wheel.read(f"{info}/WHEEL").decode())
    pure = path.name.endswith("-py3-none-any.whl")
    package = {f"polyak/{file.relative_to(ROOT / 'src/polyak').as_posix()}" for file in _package_files()}
    found = {name for name in names if not name.startswith(info) and not name.endswith("/")}
    faults = [f"lacks {name}" for name in sorted(package - found)]
    faults += [f"has {name}" for name in sorted(found - package - (set() if pure else {KERNEL}))]
    faults += [] if pure or KERNEL in names else [f"lacks {KERNEL}"]
    faults += [] if f"{info}/licenses/LICENSE" in names else ["lacks LICENSE"]
    faults += [] if metadata["Version"] == version() else [f"has version {metadata['Version']}, not {version()}"]
    faults += [] if tags["Root-Is-Purelib"] == str(pure).lower() else ["is not tagged as what it is"]
    if not pure and sys.platform == "linux" and not any(int(glibc) <= 17 for glibc, _ in NATIVE_TAG.findall(path.name)):
        faults.append(f"needs a newer glibc than 2.17, or an index refuses its tag: {path.name}")
    return faults


def _package_files() -> list[Path]:
    """Return what a wheel must have: all that is in ``src`` but compiled files."""
    files = (path for path in (ROOT / "src/polyak").rglob("*") if path.is_file())
    return [path for path in files if path.suffix not in {".pyc", ".so"}]


def sdist_faults(path: Path) -> list[str]:
    """Return what is wrong with a source distribution.

    Args:
        path: A ``.tar.gz``.
    """
    with tarfile.open(path) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    needed = {file.relative_to(ROOT).as_posix() for file in _package_files()}
    needed |= {"pyproject.toml", "hatch_build.py", "LICENSE", "README.md", "CHANGELOG.md", "PKG-INFO", "Makefile"}
    faults = [f"lacks {name}" for name in sorted(needed - names)]
    return faults + [f"has {name}" for name in sorted(names) if name.endswith((".so", ".pyc"))]


_CHECK = """
import sys, polyak, torch
from pathlib import Path
from polyak import kernels
assert Path(polyak.__file__).is_relative_to(sys.prefix), polyak.__file__
assert polyak.__version__ == sys.argv[1]
print("installed:", polyak.__version__, "kernels:", *kernels.serving_cpu())
assert ("c" in kernels.serving_cpu()) == (sys.argv[2] == "native")
"""


def install_and_run(wheel: Path, libraries: Path) -> None:
    """Install a wheel in a new environment, and run the README's first example there.

    Args:
        wheel: Any.
        libraries: A folder of packages, from which the environment takes torch and safetensors.

    Raises:
        subprocess.CalledProcessError: If a step fails.
    """
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[0]
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "venv", folder)
        binaries = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin")
        _run(str(binaries / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
        site = next(Path(folder).rglob("site-packages"))
        (site / "torch.pth").write_text(f"{libraries}\n", encoding="utf-8")
        kind = "pure" if wheel.name.endswith("-any.whl") else "native"
        _run(str(binaries / "python"), "-c", _CHECK, version(), kind, cwd=folder)
        _run(str(binaries / "python"), "-c", example, cwd=folder)
        _run(str(binaries / "polyak"), "--version", cwd=folder)


def _run(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


def main(folder: Path, libraries: Path | None) -> int:
    """Check all files; return the exit status.

    Args:
        folder: With the files.
        libraries: As for ``install_and_run``. None installs nothing.
    """
    files = sorted(folder.iterdir())
    failed = False
    for path in files:
        faults = sdist_faults(path) if path.suffix == ".gz" else wheel_faults(path)
        print(f"{path.name}: {'; '.join(faults) or 'complete'}")
        failed |= bool(faults)
    wheels = [path for path in files if path.suffix == ".whl"]
    if not any(path.name.endswith("-any.whl") for path in wheels):
        print("a pure wheel must be there")
        failed = True
    if libraries is None:
        print("not installed and run: there is no environment with torch; make one with `make check`")
    for wheel in [] if failed or libraries is None else wheels:
        print(f"{wheel.name}: installing it, and running the README's first example", flush=True)
        install_and_run(wheel.resolve(), libraries)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), next(Path(sys.argv[2]).resolve().rglob("site-packages"), None)))
