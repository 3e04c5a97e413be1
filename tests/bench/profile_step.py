#!/usr/bin/env python3
"""Where the time of a training step goes on a GPU, by kernel: one micro-batch forward and backward and one update, each kernel timed alone by
Nsight Compute (ncu), summed by name.

    python3 tests/bench/profile_step.py build/release/tessera --config configs/gpt2-medium-sparse.yaml --set train.micro_batch=8

Arguments after the binary are those of `tessera bench step`. ncu measures one counter a kernel, the duration, at the clocks that the GPU chooses
and with its caches as they are. Its overhead is tens of milliseconds a kernel, and a step of 24 layers has about a thousand: half a minute or so,
hardly more with a larger micro-batch. Kernels that overlap in a real step are timed one after another here: compare the sum with the measured step.
Needs the right to read counters: root, or the driver's NVreg_RestrictProfilingToAdminUsers=0.
"""
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

TO_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
METRIC = "gpu__time_duration.sum"


def short_name(kernel):
    """A kernel without its arguments, return type and the namespaces that all of them have."""
    depth, end = 0, len(kernel)
    for n in range(len(kernel) - 1, -1, -1):  # the argument list is the last balanced pair of brackets
        depth += {")": 1, "(": -1}.get(kernel[n], 0)
        if depth == 0 and kernel[n] == "(":
            end = n
            break
    name = kernel[:end] if end else kernel
    name = re.sub(r"^(void|static|__global__)\s+", "", name)
    return re.sub(r"tessera::(cuda::)?|\(anonymous namespace\)::|<unnamed>::|\(tessera::\w+\)", "", name).strip()


def durations(text):
    """(kernel, microseconds) of ncu's raw CSV page: a header, a row of units, a row a launch. Lines of ncu's own (==PROF==) are in between."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if not rows:
        return []
    unit = TO_US.get(rows[0][METRIC])
    if unit is None:
        sys.exit(f"profile_step.py: ncu gives durations in \"{rows[0][METRIC]}\", which this script does not know")
    return [(short_name(r["Kernel Name"]), float(r[METRIC].replace(",", "")) * unit) for r in rows[1:]]


def main():
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if not ncu:
        sys.exit("profile_step.py: ncu (Nsight Compute) is not on PATH. It comes with the CUDA Toolkit: apt-get install nsight-compute")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [ncu, "--profile-from-start", "off", "--metrics", METRIC, "--csv", "--page", "raw", "--print-units", "base"]
        command += ["--clock-control", "none", "--cache-control", "none", "--log-file", str(log)]
        result = subprocess.run(command + [sys.argv[1], "bench", "step", "--device", "cuda", "--profile"] + sys.argv[2:], text=True)
        text = log.read_text() if log.exists() else ""
    launches = durations(text)
    if result.returncode or not launches:
        sys.exit("profile_step.py: no kernel was measured.\n" + "\n".join(line for line in text.splitlines() if line.startswith("==")))

    total = defaultdict(lambda: [0.0, 0])
    for name, us in launches:
        total[name][0] += us
        total[name][1] += 1
    everything = sum(us for us, _ in total.values())
    print(f"\n{everything / 1e3:.2f} ms in {len(launches)} kernels\n\n{'ms':>9}{'share':>8}{'launches':>10}{'mean us':>10}  kernel")
    for name, (us, count) in sorted(total.items(), key=lambda item: -item[1][0]):
        print(f"{us / 1e3:>9.3f}{100 * us / everything:>7.1f}%{count:>10}{us / count:>10.1f}  {name[:150]}")


if __name__ == "__main__":
    main()
