#!/usr/bin/env python3
"""The CUDA attention beside PyTorch's dense kernels (cuDNN and FlashAttention-2 through SDPA), and for windows its FlexAttention (compiled, with a
block mask), measured in one run on one GPU.

usage: attention_cuda.py BINARY [options of the binary]

TFLOP/s as 4 T^2 D H B / 2 forward, 3.5 times that forward and backward (a window: T x window edges). The speed of light beside it is a
bf16 matrix product of 8192^3 in the same run. Ratios above 1 mean the CUDA attention is faster.
"""
import json
import subprocess
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

H = 16


def median_ms(f, repeats=30, calls=1):
    """Median time of `calls` calls of f in a row, over their number; calls of 50 ms go before."""
    begin = time.monotonic()
    while time.monotonic() - begin < 0.05:
        f()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            f()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return sorted(times)[repeats // 2]


def measured(attention, batch, tokens, size):
    """Milliseconds of attention(q, k, v): forward, forward and backward, and both with twenty calls in a row."""
    q, k, v = (torch.randn(batch, H, tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    do = torch.randn(batch, H, tokens, size, device="cuda", dtype=torch.bfloat16)

    def both():
        q.grad = k.grad = v.grad = None
        attention(q, k, v).backward(do)

    def forward():
        attention(q, k, v)

    with torch.no_grad():
        fwd, fwd_stream = median_ms(forward), median_ms(forward, 5, 20)
    return fwd, median_ms(both), fwd_stream, median_ms(both, 5, 20)


def sdpa(backend):
    def attention(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attention


def flex(window, tokens):
    def visible(b, h, i, j):
        return (j <= i) & (i - j < window)

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def gemm_tflops(n=8192):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b) * 1e-9


def main():
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cuDNN", torch.backends.cudnn.version())
    light = gemm_tflops()
    print(f"bf16 GEMM 8192^3: {light:.0f} TFLOP/s")
    lines = subprocess.run(sys.argv[1:], capture_output=True, text=True)
    if lines.returncode:
        sys.exit(lines.stderr)
    baseline, rows = {}, [json.loads(line) for line in lines.stdout.splitlines()]
    print(f"{'case':22}{'B':>3}{'T':>7}{'fwd ms':>9}{'TFLOP/s':>9}{'f+b ms':>9}{'TFLOP/s':>9}{'of GEMM':>9}{'tiles':>7}{'cuDNN f':>9}{'f+b':>8}{'ratio':>7}{'f+b':>6}{'FA2 f':>8}{'f+b':>8}")
    for r in rows:
        key = (r["B"], r["T"], r["D"])
        if key not in baseline and r["T"] <= 16384:
            baseline[key] = [measured(sdpa(b), *key) for b in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)]
        row = f"{r['case']:22}{r['B']:3}{r['T']:7}{r['fwd_ms']:9.3f}{r['fwd_tflops']:9.0f}{r['both_ms']:9.3f}{r['both_tflops']:9.0f}{r['both_tflops'] / light:9.2f}{r['active_tiles']:7.3f}"
        if key in baseline:
            (cf, cb, *_), (ff, fb, *_) = baseline[key]
            row += f"{cf:9.3f}{cb:8.3f}{cf / r['fwd_ms']:7.2f}{cb / r['both_ms']:6.2f}{ff:8.3f}{fb:8.3f}"
        print(row, flush=True)
    print("\nthe same calls, ms: one at a time and twenty in a row with the automatic schedule; one at a time, a block a band and persistent")
    print(f"{'case':22}{'B':>3}{'T':>7}{'fwd':>9}{'stream':>9}{'block':>9}{'persist':>9}{'f+b':>9}{'stream':>9}{'block':>9}{'persist':>9}{'cuDNN f stream':>16}{'f+b stream':>12}")
    for r in rows:
        row = f"{r['case']:22}{r['B']:3}{r['T']:7}" + "".join(f"{r[k + t + '_ms']:9.3f}" for k in ("fwd", "both") for t in ("", "_stream", "_block", "_persistent"))
        if (key := (r["B"], r["T"], r["D"])) in baseline:
            row += f"{baseline[key][0][2]:16.3f}{baseline[key][0][3]:12.3f}"
        print(row)
    print("\nwindows beside FlexAttention, ms: one at a time and twenty in a row; ratios above 1: the CUDA attention is faster")
    print(f"{'case':22}{'B':>3}{'T':>7}{'fwd':>9}{'stream':>9}{'f+b':>9}{'stream':>9}{'Flex f':>9}{'stream':>9}{'f+b':>9}{'stream':>9}{'ratio':>7}{'f+b':>6}")
    for r in rows:
        if not r["window"]:
            continue
        ours = [r[k + t + "_ms"] for k in ("fwd", "both") for t in ("", "_stream")]
        f, b, f_stream, b_stream = measured(flex(r["window"], r["T"]), r["B"], r["T"], r["D"])
        theirs = (f, f_stream, b, b_stream)
        print(f"{r['case']:22}{r['B']:3}{r['T']:7}" + "".join(f"{x:9.3f}" for x in (*ours, *theirs)) + f"{theirs[1] / ours[1]:7.2f}{theirs[3] / ours[3]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
