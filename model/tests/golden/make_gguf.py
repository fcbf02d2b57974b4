#!/usr/bin/env python3
"""Makes gguf-*.bin here: numbers, and the blocks that gguf-py and llama-quantize make of them.

usage: make_gguf.py LLAMA_QUANTIZE     needs numpy and gguf

gguf-values.bin holds 8 rows of 256 numbers (f32). gguf-<type>.bin holds the blocks of all rows: F16, BF16, Q4_0, Q4_1,
Q5_0, Q5_1, Q8_0 by gguf-py's quantize; Q4_K, Q5_K and Q6_K by llama-quantize from a file with one tensor of F32.
gguf-<type>-values.bin holds the numbers that gguf-py's dequantize makes of the blocks.
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

HERE = pathlib.Path(__file__).resolve().parent


def values():
    """Rows that differ in scale, sign, sparsity and outliers; the last ones are constant, zero, and tiny."""
    rng = np.random.default_rng(19)
    rows = rng.standard_normal((8, 256)).astype(np.float32)
    rows[1] *= 0.02
    rows[2] = np.abs(rows[2]) * 3
    rows[3, ::7] = 0
    rows[4, 5] = 40
    rows[5, :32] = 0
    rows[5, 32:64] = 0.25
    rows[5, 64:96] = -0.25
    rows[6] = 0
    rows[7] *= 1e-7
    return rows


def by_llama_quantize(binary, rows, name, folder):
    """Quantises rows as the tensor blk.0.ffn_up.weight of a model of one layer."""
    writer = GGUFWriter(folder / "in.gguf", "llama")
    for key, number in {"block_count": 1, "context_length": 8, "embedding_length": 256, "feed_forward_length": 8,
                        "attention.head_count": 1}.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("none")
    writer.add_tensor("blk.0.ffn_up.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    command = [binary, "--pure", folder / "in.gguf", folder / "out.gguf", name, "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return np.array(GGUFReader(folder / "out.gguf").tensors[0].data)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = values()
    rows.tofile(HERE / "gguf-values.bin")
    blocks = {kind.name: quantize(rows, kind) for kind in (T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0)}
    with tempfile.TemporaryDirectory() as folder:
        for kind, name in ((T.Q4_K, "Q4_K_S"), (T.Q5_K, "Q5_K_S"), (T.Q6_K, "Q6_K")):
            blocks[kind.name] = by_llama_quantize(sys.argv[1], rows, name, pathlib.Path(folder))
    for name, data in blocks.items():
        data.tofile(HERE / f"gguf-{name.lower()}.bin")
        dequantize(data, T[name]).astype(np.float32).tofile(HERE / f"gguf-{name.lower()}-values.bin")


main()
