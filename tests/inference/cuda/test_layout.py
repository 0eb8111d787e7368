"""How the CUDA engine lays out weights and rounded tokens: products come out right whatever the sizes."""

import pytest
import torch

from bitnet_lit.inference.engines.cuda.layout import pack_words, permute_bytes, quantize_rows, words_in_row


def planes(words):
    """Codes of packed words in the order of a rounded token: (N, 4 planes, T words, 4 bytes) flattened."""
    as_bytes = words.view(torch.uint8)  # little-endian: byte b of a word is its bits 8 b to 8 b + 7
    return torch.cat([(as_bytes >> 2 * c & 3).to(torch.int8) - 1 for c in range(4)], dim=1)


@pytest.mark.parametrize("inputs", [1, 255, 256, 257, 700, 2560, 4100])
def test_a_packed_row_times_a_permuted_token_is_their_product(inputs):
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(-1, 2, (7, inputs), generator=generator, dtype=torch.int8)
    tokens = torch.randint(-127, 128, (3, inputs), generator=generator, dtype=torch.int8)
    words = pack_words(codes)
    assert words.dtype == torch.int32 and words.shape == (7, words_in_row(inputs))
    assert words.shape[1] % 16 == 0 and 16 * words.shape[1] >= inputs
    product = permute_bytes(tokens).long() @ planes(words).long().T
    assert torch.equal(product, tokens.long() @ codes.long().T)


def test_one_word_is_what_the_page_says():
    codes = torch.zeros(1, 256, dtype=torch.int8)  # T = 16: word 5 holds the inputs 5, 21, 37, ...
    codes[0, (4 * 2 + 3) * 16 + 5] = 1  # plane 2, byte 3
    zeros = int.from_bytes(b"\x55" * 4, "little")  # code 0 is stored as 1
    word = int(pack_words(codes)[0, 5]) & 0xFFFFFFFF
    assert word == zeros + (1 << (8 * 3 + 2 * 2))


def test_padding_is_zero():
    assert planes(pack_words(-torch.ones(1, 3, dtype=torch.int8))).sum() == -3
    assert permute_bytes(torch.ones(1, 3, dtype=torch.int8)).sum() == 3


def test_rows_of_a_head_keep_their_values_to_half_a_step():
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 50)[:, None]
    rows[7] = 0
    codes, scale = quantize_rows(rows)
    assert codes.dtype == torch.int8 and scale.shape == (50,)
    # Half a step, and as much again as the last bit of the quotient may move it.
    assert ((codes * scale[:, None] - rows).abs() <= 0.5001 * scale[:, None]).all()
    assert codes.abs().amax(dim=1).tolist() == [0 if row == 7 else 127 for row in range(50)]
