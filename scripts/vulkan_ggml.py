#!/usr/bin/env python3
"""Build or reuse a libggml that computes on Vulkan devices, Mesa's software one included; print its folder.

    PIPO_GGML=$(python3 scripts/vulkan_ggml.py) pipo doctor

Needs a Debian-like machine. What is missing is installed with apt when this runs as root; where it cannot be had, one
line on stderr says why, and nothing is printed. The compiled libraries are kept in
${XDG_CACHE_HOME:-~/.cache}/pipo/libggml/ under a key made of everything they depend on, so that only the first run
compiles: three minutes on two cores, later ones 0.1 s.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipo"
# Debian package → the program that shows it is there
COMPILERS = {"g++": "g++", "glslc": "glslc"}
LOADER_PACKAGE, DRIVER_PACKAGE = "libvulkan1", "mesa-vulkan-drivers"
DRIVER_FOLDERS = (Path("/usr/share/vulkan/icd.d"), Path("/etc/vulkan/icd.d"))
# ggml 0.15.3 needs newer Vulkan headers than Debian 12 has (1.3.239); those of Debian 13 (1.4.309) work
HEADER_PACKAGES = ("libvulkan-dev", "spirv-headers")
HEADER_SUITE = "trixie"
DEBIAN_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CMAKE_SWITCHES = ("-DGGML_VULKAN=ON", "-DGGML_LLAMAFILE=ON")


class CannotHaveItError(Exception):
    """This machine lacks something that this script may not or cannot bring."""


def main() -> int:
    try:
        install_missing(runtime_packages())
        print(find_or_build(requirement()))
    except CannotHaveItError as reason:
        print(f"vulkan_ggml: {reason}", file=sys.stderr)
    return 0


def runtime_packages() -> list[str]:
    """What running needs and this machine lacks: the Vulkan loader, and a driver, any will do."""
    missing = []
    if ctypes.util.find_library("vulkan") is None:
        missing.append(LOADER_PACKAGE)
    if not any(path.suffix == ".json" for folder in DRIVER_FOLDERS if folder.is_dir() for path in folder.iterdir()):
        missing.append(DRIVER_PACKAGE)
    return missing


def install_missing(missing: Sequence[str]) -> None:
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise CannotHaveItError(f"missing {', '.join(missing)}; as root: apt-get install {' '.join(missing)}")
    fetch("apt-get", "update", "--quiet=2")
    fetch("apt-get", "install", "--quiet=2", "--yes", "--no-install-recommends", *missing,
        env={"DEBIAN_FRONTEND": "noninteractive"})  # fmt: skip


def requirement() -> str:
    """The ggml-python that pipo is pinned to."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (ggml,) = (each for each in dependencies if each.startswith("ggml-python=="))
    return str(ggml)


def find_or_build(requirement: str) -> Path:
    """The folder of the shared libraries."""
    folder = CACHE / "libggml" / f"{requirement.replace('==', '-')}-vulkan-{digest(*build_inputs())}"
    if not folder.is_dir():
        build(requirement, folder)
    return folder / "ggml" / "lib"


def build_inputs() -> list[str]:
    """What the compiled libraries depend on besides their source: the CPU, the switches, the headers, the C library."""
    return [cpu_flags(), *CMAKE_SWITCHES, HEADER_SUITE, *platform.libc_ver(), sysconfig.get_platform()]


def cpu_flags() -> str:
    """ggml compiles for the machine it is built on."""
    text = Path("/proc/cpuinfo").read_text()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return " ".join(sorted(line[1].split())) if line else platform.processor()


def build(requirement: str, folder: Path) -> None:
    """Compile into a folder beside the final one and rename: an interrupted build leaves nothing that looks whole."""
    install_missing([package for package, program in COMPILERS.items() if shutil.which(program) is None])
    headers = unpacked_headers()
    cmake = [*CMAKE_SWITCHES, f"-DVulkan_INCLUDE_DIR={headers}/include", f"-DVulkan_LIBRARY={vulkan_library()}",
             f"-DSPIRV-Headers_DIR={headers}/share/cmake/SPIRV-Headers"]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        run(sys.executable, "-m", "venv", f"{scratch}/venv")
        # without pip's own cache, whose wheel of this version was compiled with other switches
        run(f"{scratch}/venv/bin/pip", "install", "--quiet", "--no-cache-dir", "--no-deps",
            "--no-binary", "ggml-python", "--target", f"{scratch}/unpacked", requirement,
            env={"CMAKE_ARGS": shlex.join(cmake), "CXXFLAGS": f"-I{headers}/include"})  # fmt: skip
        Path(scratch, "unpacked").rename(folder)


def unpacked_headers() -> Path:
    """Vulkan's and SPIR-V's headers of Debian 13, unpacked aside; the folder is used as `usr` would be.

    Fetched with apt from the mirror this machine is set up with, checked against Debian's keys as any package is.
    """
    folder = CACHE / f"vulkan-headers-{HEADER_SUITE}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            download_headers(Path(scratch))
            for package in Path(scratch).glob("*.deb"):
                run("dpkg-deb", "--extract", str(package), f"{scratch}/unpacked")
            Path(scratch, "unpacked").rename(folder)
    return folder / "usr"


def download_headers(folder: Path) -> None:
    """With lists of apt's own in `folder`: those of the machine stay as they are."""
    mirror = debian_mirror() if shutil.which("apt-get") else None
    if mirror is None:
        raise CannotHaveItError(f"no Debian mirror among apt's sources; unpack {' and '.join(HEADER_PACKAGES)} of "
                                f"Debian {HEADER_SUITE} into {CACHE}/vulkan-headers-{HEADER_SUITE}")  # fmt: skip
    for name in ("parts", "lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    signed = f"[signed-by={DEBIAN_KEYS}] " if DEBIAN_KEYS.is_file() else ""
    (folder / "parts" / "newer.list").write_text(f"deb {signed}{mirror} {HEADER_SUITE} main\n")
    options = {
        "Dir::Etc::SourceList": "/dev/null", "Dir::Etc::SourceParts": f"{folder}/parts",
        "Dir::State::Lists": f"{folder}/lists", "Dir::Cache": f"{folder}/cache", "APT::Sandbox::User": "",
    }  # fmt: skip
    apt = ["apt-get", "--quiet=2", *(f"--option={name}={value}" for name, value in options.items())]
    fetch(*apt, "update")
    fetch(*apt, "download", *HEADER_PACKAGES, cwd=folder)


def debian_mirror() -> str | None:
    """The address this machine has Debian's main archive from; None when its sources name none."""
    query = [
        "apt-get",
        "indextargets",
        "--format=$(ORIGIN) $(RELEASE) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]
    rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    if not rows and os.geteuid() == 0:  # no lists yet
        fetch("apt-get", "update", "--quiet=2")
        rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    archives = (re.fullmatch(r"Debian [a-z]+ main (\S+)", row) for row in rows)
    return next((match[1] for match in archives if match), None)


def vulkan_library() -> str:
    """The loader's file by its full name: without its development package there is no plain libvulkan.so to find."""
    name = ctypes.util.find_library("vulkan")
    folders = (Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or ""), Path("/usr/lib"), Path("/usr/lib64"))
    for folder in folders:
        if name and (folder / name).exists():
            return str(folder / name)
    raise CannotHaveItError(
        f"{name} is in none of {', '.join(map(str, folders))}; as root: apt-get install libvulkan-dev"
    )


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def run(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """What the command prints goes to stderr."""
    done = subprocess.run(command, env=os.environ | dict(env or {}), cwd=cwd, stdout=sys.stderr)
    if done.returncode:
        sys.exit(f"vulkan_ggml: {shlex.join(command)} failed (exit {done.returncode})")


def fetch(*command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
    """Raises CannotHaveItError: the network, or the right to install, may be missing."""
    if subprocess.run(command, env=os.environ | dict(env or {}), cwd=cwd, stdout=sys.stderr).returncode:
        raise CannotHaveItError(f"{shlex.join(command)} failed")


if __name__ == "__main__":
    sys.exit(main())
