from __future__ import annotations

import numpy as np
import torch


def test_perplexity_is_that_of_the_loss_of_transformers(reference, ours):
    theirs = reference.make(embedding_std=0.2)
    model = ours(theirs)
    lengths = [128, 40, 7, 2]
    token_ids = reference.ids(len(lengths), max(lengths))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype("int32")
    expected = []
    for row, length in zip(token_ids, lengths, strict=True):
        tokens = torch.tensor(row[None, :length], dtype=torch.long)
        with torch.no_grad():
            expected.append(theirs(tokens, labels=tokens, use_cache=False).loss.double().exp().item())
    found = model.perplexity({"token_ids": token_ids * mask, "padding_mask": mask})
    np.testing.assert_allclose(found, expected, rtol=1e-4)
