"""Which samples are alike: near-duplicates by shared runs of tokens, and clusters by the tokens used."""

from __future__ import annotations

from collections.abc import Sequence

RUN = 5
"""Tokens in a run; two samples are compared by the share of their runs that they have in common."""
PERMUTATIONS = 128
FEATURES = 1 << 16


def near_duplicates(
    samples: Sequence[Sequence[int]], order: Sequence[int], threshold: float
) -> dict[int, int]:
    """For each sample much like one before it in `order`: the first such one, by index.

    Alike are two samples whose sets of runs of five tokens have a Jaccard similarity of about
    `threshold` or more, as estimated by MinHash (128 permutations, standard error 0.04 at most).
    """
    from datasketch import MinHash, MinHashLSH

    # The index cannot be made for more than 0.98; what it finds is compared again below.
    index = MinHashLSH(threshold=min(threshold, 0.98), num_perm=PERMUTATIONS)
    found: dict[int, int] = {}
    hashes: dict[int, tuple[int, MinHash]] = {}  # rank and hash of those not found alike
    for at in order:
        tokens = list(samples[at])
        runs = {tuple(tokens[i : i + RUN]) for i in range(max(len(tokens) - RUN + 1, 1))}
        minhash = MinHash(num_perm=PERMUTATIONS)
        minhash.update_batch([repr(run).encode() for run in runs])
        near = [i for i in index.query(minhash) if hashes[i][1].jaccard(minhash) >= threshold]
        if near:
            found[at] = min(near, key=lambda i: hashes[i][0])
        else:
            hashes[at] = (len(hashes), minhash)
            index.insert(at, minhash)
    return found


def clusters(samples: Sequence[Sequence[int]], count: int, seed: int) -> list[int]:
    """A cluster per sample: k-means of the tokens used, weighted by tf-idf."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    words = HashingVectorizer(
        analyzer=lambda tokens: [str(token) for token in tokens],
        n_features=FEATURES,
        alternate_sign=False,
    )
    vectors = TfidfTransformer().fit_transform(words.transform(samples))
    count = min(count, len(samples))
    found = MiniBatchKMeans(count, random_state=seed, n_init=3).fit_predict(vectors)
    return [int(cluster) for cluster in found]
