#!/usr/bin/env python3
"""Times the forms of the CUDA attention kernels that kernels/cuda/attention/tuning.h chooses between, each built on its own, in one run on one GPU.

usage: attention_variants.py [options of the bench binary]        (needs nvcc; builds for sm_90a in a temporary folder)
"""
import concurrent.futures
import glob
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VARIANTS = {
    "as it stands": {},
    "forward: pairs": {"GROUPS_FORWARD": 2},
    "dq: threes": {"GROUPS_Q": 3},
    "dk, dv: nothing ahead": {"AHEAD_KV": 0},
    "dk, dv: ahead, less": {"AHEAD_KV": 2},
}
AFFECTS = {"GROUPS_FORWARD": ["forward_64.cu"], "AHEAD_KV": ["backward_kv_64.cu"], "GROUPS_Q": ["backward_q_64.cu"]}
NVCC = ["nvcc", "-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--expt-relaxed-constexpr", "-I" + ROOT]


def main():
    sources = glob.glob(ROOT + "/kernels/cuda/attention/*.cu") + [ROOT + "/tests/bench/attention_cuda.cu"]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_source(source, choices):
            used = {k: v for k, v in choices.items() if os.path.basename(source) in AFFECTS[k]}
            tag = "".join(f"-{k}{v}" for k, v in sorted(used.items()))
            target = f"{folder}/{os.path.basename(source)}{tag}.o"
            defines = [f"-DTESSERA_ATTENTION_{k}={v}" for k, v in used.items()]
            return target, NVCC + defines + ["-c", source, "-o", target]

        plans = {name: [compile_source(s, choices) for s in sources] for name, choices in VARIANTS.items()}
        jobs = {target: command for plan in plans.values() for target, command in plan}
        list(pool.map(lambda command: subprocess.run(command, check=True), jobs.values()))
        for name, plan in plans.items():
            binary = f"{folder}/bench"
            subprocess.run(NVCC + [target for target, _ in plan] + ["-o", binary], check=True)
            out = subprocess.run([binary] + sys.argv[1:], check=True, capture_output=True, text=True).stdout
            print(f"\n{name:25}{'':>10}{'fwd block':>11}{'persist':>9}{'f+b block':>11}{'persist':>9}{'bwd block':>11}{'persist':>9}")
            for r in map(json.loads, out.splitlines()):
                fb, fp, bb, bp = (r[k] for k in ("fwd_block_ms", "fwd_persistent_ms", "both_block_ms", "both_persistent_ms"))
                print(f"  {r['case']:22}{r['B']:3}{r['T']:8}{fb:11.3f}{fp:9.3f}{bb:11.3f}{bp:9.3f}{bb - fb:11.3f}{bp - fp:9.3f}", flush=True)


if __name__ == "__main__":
    main()
