#!/usr/bin/env python3
"""MB/s on one core of Tessera's GPT-2 tokenizer and of tiktoken, in turn on the same text, token for token the same. Needs `pip install tiktoken`.

    tests/bench/tokenizer.py build/release/tessera GPT2_DIR TEXT [ROUNDS]

GPT2_DIR holds vocab.bpe and encoder.json; TEXT is UTF-8, some tens of MB of it. The best of the rounds counts for each. Exit code 1: tokens differ.
"""
import json
import os
import subprocess
import sys
import time

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

END = "<|endoftext|>"


def load_tiktoken(folder):
    printable = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    with open(os.path.join(folder, "encoder.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)
    ranks = {bytes(byte_of[c] for c in token): id for token, id in vocabulary.items() if token != END}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END: vocabulary[END]})


def main():
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    tessera, folder, path = sys.argv[1:4]
    rounds = int(sys.argv[4]) if len(sys.argv) == 5 else 5
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    size = os.path.getsize(path)
    encoding = load_tiktoken(folder)
    seconds = {"tessera": [], "tiktoken": []}
    for _ in range(rounds):
        command = [tessera, "tokenizer", "encode", "--json", "--tokenizer", f"gpt2:{folder}", path]
        ours = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        seconds["tessera"].append(ours["seconds"])
        start = time.perf_counter()
        theirs = encoding.encode_ordinary(text)
        seconds["tiktoken"].append(time.perf_counter() - start)
        if ours["tokens"] != theirs:
            sys.exit("the tokens differ")
    for name, times in seconds.items():
        print(f"{name:10} {size / min(times) / 1e6:7.1f} MB/s   (slowest round {size / max(times) / 1e6:.1f})")
    print(f"tessera / tiktoken {tiktoken.__version__}: {min(seconds['tiktoken']) / min(seconds['tessera']):.2f}x, {len(theirs)} tokens the same")


if __name__ == "__main__":
    main()
