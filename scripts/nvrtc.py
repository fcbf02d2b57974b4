#!/usr/bin/env python3
"""Compiles the CUDA C++ of all kernels with NVRTC and prints what each takes of a GPU's registers.

    cargo run --release -p potstill-kernels --features wgpu,cuda-sources --example cuda_sources -- FOLDER
    scripts/nvrtc.py FOLDER [CACHE]

FOLDER holds sm_80/*.cu and sm_90/*.cu. NVRTC needs no GPU, and is installed with pip in the folder CACHE
[~/.cache/potstill/nvrtc]. If it cannot be installed, the script says so and succeeds. A text that does not
compile is an error, and so is a kernel of kernels/src of which FOLDER has no text.
"""

import ctypes
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGES = [
    "nvidia-cuda-nvrtc-cu12==12.9.86",
    "nvidia-cuda-runtime-cu12==12.9.79",
    "nvidia-cuda-cccl-cu12==12.9.27",
]


class Nvrtc:
    def __init__(self, cache):
        nvidia = cache / "nvidia"
        # Found by NVRTC through the loader, so it is loaded first.
        ctypes.CDLL(str(next(nvidia.glob("cuda_nvrtc/lib/libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(nvidia / "cuda_nvrtc/lib/libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.includes = [nvidia / "cuda_runtime/include", nvidia / "cuda_cccl/include"]

    def call(self, name, *arguments):
        result = getattr(self.library, name)(*arguments)
        return None if result == 0 else self.library.nvrtcGetErrorString(result).decode()

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, path):
        """Returns (error or None, log, bytes of machine code)."""
        architecture = path.parent.name
        # As CubeCL asks for it.
        if architecture == "sm_90":
            architecture = "sm_90a"
        options = [f"--gpu-architecture={architecture}", "-lineinfo", "--ptxas-options=-v"]
        options += [f"--include-path={folder}" for folder in self.includes]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        program = ctypes.c_void_p()
        source = path.read_bytes()
        name = path.name.encode()
        error = self.call("nvrtcCreateProgram", ctypes.byref(program), source, name, 0, None, None)
        if error:
            return error, "", 0
        error = self.call("nvrtcCompileProgram", program, len(options), array)
        log = self.text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        code = 0 if error else len(self.text(program, "CUBIN"))
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return error, log, code


def install(cache):
    if all((cache / "nvidia" / part).exists() for part in ["cuda_nvrtc/lib", "cuda_runtime/include", "cuda_cccl/include"]):
        return True
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), *PACKAGES]
    return subprocess.run(pip).returncode == 0


def usage(log):
    """The registers and the bytes of spills and of shared memory that ptxas reports."""
    found = {
        "registers": re.search(r"Used (\d+) registers", log),
        "bytes spilled": re.search(r"(\d+) bytes spill stores", log),
    }
    return {name: int(match[1]) for name, match in found.items() if match}


def missing_kernels(sources, texts):
    """Names of kernels in the Rust sources that no text has."""
    kernel = re.compile(r"#\[cube\(launch\w*\)\]\s*(?:pub\S*\s+)?fn (\w+)")
    names = {name for path in sources.rglob("*.rs") for name in kernel.findall(path.read_text())}
    everything = "\n".join(text.read_text() for text in texts)
    return sorted(name for name in names if name not in everything)


def main():
    folder = Path(sys.argv[1])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "potstill/nvrtc"
    if len(sys.argv) > 2:
        cache = Path(sys.argv[2])
    paths = sorted(folder.glob("sm_*/*.cu"))
    if not paths:
        sys.exit(f"nvrtc.py: no {folder}/sm_*/*.cu")
    architectures = sorted({path.parent.name for path in paths})
    for architecture in architectures:
        texts = [path for path in paths if path.parent.name == architecture]
        missing = missing_kernels(Path(__file__).parent.parent / "kernels/src", texts)
        if missing:
            sys.exit(f"nvrtc.py: {architecture} has no CUDA C++ of {', '.join(missing)}")
    if not install(cache):
        print("NVRTC could not be installed, so the CUDA kernels are not compiled")
        return
    nvrtc = Nvrtc(cache)
    start = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = dict(zip(paths, threads.map(nvrtc.compile, paths)))
    for path, (error, log, _) in results.items():
        if error:
            sys.exit(f"{path}: {error}\n{log}")
    width = max(len(path.stem) for path in paths)
    print(f"{'kernel':{width}}  " + "  ".join(f"{name:>28}" for name in architectures))
    for stem in sorted({path.stem for path in paths}):
        cells = []
        for architecture in architectures:
            _, log, code = results[folder / architecture / f"{stem}.cu"]
            used = usage(log)
            spilled = f", {used['bytes spilled']} B spilled" if used.get("bytes spilled") else ""
            cells.append(f"{used.get('registers', '?')} registers{spilled}".rjust(28))
        print(f"{stem:{width}}  " + "  ".join(cells))
    print(f"{len(paths)} texts compiled for {' and '.join(architectures)} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
