"""The form for any device: dense tiles while rows are short, chunks from where those cost less."""

from hax_jax.ops.sparse_attention import chunks, dense

# Dense tiles cost t a query, chunks a constant; measured on an H200 with HAX's 32 + 32 keys.
MIN_LENGTH_OF_CHUNKS = 2048


def sparse_attention(q, k, v, key_set, segment_ids, scale, uniform_empty_rows, dtype):
    arguments = (q, k, v, key_set, segment_ids, scale, uniform_empty_rows)
    if q.shape[1] >= MIN_LENGTH_OF_CHUNKS and chunks.can_plan(key_set):
        return chunks.sparse_attention(*arguments, tile=chunks.XLA_TILE).astype(dtype)
    return dense.sparse_attention(*arguments).astype(dtype)
