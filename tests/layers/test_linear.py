"""Products whose gradients round their factors as the forward pass does, and a lookup without a scatter."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from hax_jax.layers.linear import lookup, matmul, split_matmul

BF16 = jnp.bfloat16


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def gradients(dtype):
    x, kernel, weight = normal(0, 2, 50, 6), normal(1, 6, 5), normal(2, 2, 50, 5)
    return jax.grad(lambda x, kernel: (matmul(x, kernel, dtype) * weight).sum(), (0, 1)), x, kernel, weight


def test_product_and_gradients_in_float32_are_the_usual_ones():
    gradient, x, kernel, weight = gradients(jnp.float32)
    d_x, d_kernel = gradient(x, kernel)
    np.testing.assert_allclose(matmul(x, kernel, jnp.float32), x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_x, weight @ kernel.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernel, np.einsum("bti,bto->io", x, weight), rtol=1e-5, atol=1e-5)


def test_gradients_in_bfloat16_round_factors_and_not_sums():
    gradient, x, kernel, weight = gradients(BF16)
    d_x, d_kernel = gradient(x, kernel)
    rounded = [np.asarray(array.astype(BF16), np.float64) for array in (x, kernel, weight)]
    np.testing.assert_allclose(d_x, rounded[2] @ rounded[1].T, rtol=1e-5, atol=1e-5)
    wanted = np.einsum("bti,bto->io", rounded[0], rounded[2])
    np.testing.assert_allclose(d_kernel, wanted, rtol=1e-5, atol=1e-5)
    # No product has a float32 factor, which would keep it off the tensor cores.
    lowered = jax.jit(gradient).lower(x, kernel).as_text()
    assert set(re.findall(r"dot_general.*\(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", lowered)) == {
        ("bf16", "bf16")
    }


def test_blocks_of_a_product_and_their_gradients_are_those_of_the_whole():
    """Each block has products of its own; the gradient of x has none with a narrow block."""
    sizes, width = (70, 8, 65, 3), 146
    x, kernel, weight = normal(0, 2, 50, 6), normal(1, 6, width), normal(2, 2, 50, width)

    def gradient(whole):
        def loss(x, kernel):
            blocks = split_matmul(x, kernel, sizes, jnp.float32)
            assert tuple(block.shape[-1] for block in blocks) == sizes
            product = matmul(x, kernel, jnp.float32) if whole else jnp.concatenate(blocks, axis=-1)
            return (product**2 * weight).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    got, want = gradient(False)(x, kernel), gradient(True)(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)
    products = re.findall(
        r"dot_general.*?: \(tensor<([\dx]+)xf32>", gradient(False).lower(x, kernel).as_text()
    )
    # Forward one and for the kernel one a block; for x those of 70 and 65 columns.
    assert len(products) == 2 * len(sizes) + 2


def test_gradient_of_a_lookup_is_that_of_take():
    table, tokens, weight = normal(0, 7, 3), jnp.array([[1, 4, 4, 0], [4, 6, 1, 4]]), normal(1, 2, 4, 3)

    def gradient(function):
        return jax.grad(lambda table: (function(table) * weight).sum())

    fast = gradient(lambda table: lookup(table, tokens, jnp.float32))
    usual = gradient(lambda table: jnp.take(table, tokens, axis=0))
    np.testing.assert_array_equal(lookup(table, tokens, jnp.float32), table[tokens])
    np.testing.assert_allclose(fast(table), usual(table), rtol=1e-6, atol=1e-6)
    assert "scatter" in str(jax.make_jaxpr(usual)(table))
    assert "scatter" not in str(jax.make_jaxpr(fast)(table))


def test_gradients_of_lookups_that_share_their_tokens():
    """As the members of a population do, in the dtype that matmuls have by default."""
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 20)
    tables, weights = normal(1, 3, 20, 6), normal(2, 3, 2, 9, 6)

    def gradient(table, weight):
        return jax.grad(lambda table: (lookup(table, tokens, BF16) * weight).sum())(table)

    together = jax.jit(jax.vmap(gradient))(tables, weights)
    for member in range(3):
        np.testing.assert_allclose(together[member], gradient(tables[member], weights[member]), rtol=1e-6)


def test_each_device_sums_as_many_parts_as_one_device_alone():
    """Twice the positions on two devices: the parts of each are as many and as long as before."""
    x, kernel = normal(0, 16384, 6), normal(1, 6, 5)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(lambda kernel: matmul(x, kernel, BF16).sum())).lower(kernel).as_text()
    assert re.search(r"dot_general.*?: \(tensor<128x128x6xbf16>, tensor<128x128x5xbf16>", text)


def test_gradient_over_many_positions_is_the_sum_of_that_over_parts():
    """8,192 positions are summed in 64 parts side by side, 8,191 in one."""
    x, kernel, weight = normal(0, 8192, 6), normal(1, 6, 5), normal(2, 8192, 5)

    def gradient(count):
        return jax.grad(lambda kernel: (matmul(x[:count], kernel, BF16) * weight[:count]).sum())

    for count in (8191, 8192):
        exact = np.asarray(x[:count].astype(BF16), np.float64).T @ np.asarray(weight[:count].astype(BF16))
        np.testing.assert_allclose(gradient(count)(kernel), exact, rtol=1e-4, atol=1e-3)
        shapes = re.findall(
            r"dot_general.*?: \(tensor<([\dx]+)xbf16>, tensor<([\dx]+)xbf16>",
            jax.jit(gradient(count)).lower(kernel).as_text(),
        )
        assert (("64x128x6", "64x128x5") in shapes) == (count == 8192)
