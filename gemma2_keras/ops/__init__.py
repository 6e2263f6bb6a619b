"""The mathematics of Gemma 2 in `keras.ops`: small pure functions, read first and kept as the reference.

Letters of shapes and einsums, everywhere: B batch, T query positions, S key positions, N query heads, K key-value
heads, G query heads of one key-value head, H head size, D model width, F feed-forward width, V vocabulary, L layers,
R adapter rank.
"""
