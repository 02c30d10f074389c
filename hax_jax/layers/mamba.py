"""The mixer of Mamba-1, with the sparse attention branch where the configuration has one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.config import ModelConfig
from hax_jax.layers import initializers
from hax_jax.layers.hax import BranchOutput, HaxBranch, RoutingDraws
from hax_jax.layers.linear import Linear
from hax_jax.layers.precision import Precision
from hax_jax.layers.sequence import Keep, Sequence
from hax_jax.ops import causal_conv1d, selective_scan
from hax_jax.ops.numerics import wide


class CausalConv(nnx.Module):
    """`ops.causal_conv1d` with a learned filter and bias, uniform in +-`bound` or N(0, `scale`) and 0."""

    def __init__(
        self,
        channels: int,
        config: ModelConfig,
        *,
        bound: float | None = None,
        scale: float = 0.0,
        rngs: nnx.Rngs,
    ):
        dtype = Precision.named(config.precision).param
        shape = (config.conv_kernel, channels)
        if bound is None:
            self.weight = nnx.Param(initializers.normal(rngs.params(), shape, scale, dtype))
            self.bias = nnx.Param(jnp.zeros(channels, dtype))
        else:
            self.weight = nnx.Param(initializers.uniform(rngs.params(), shape, bound, dtype))
            self.bias = nnx.Param(initializers.uniform(rngs.params(), (channels,), bound, dtype))
        self.implementation = config.op_implementation

    def __call__(
        self, x: Float[Array, "b t c"], sequence: Sequence, sizes: tuple[int, ...] | None = None
    ) -> Any:
        """The filtered x (b, t, c), of which pads are no part; with `sizes` blocks of so many channels."""
        return causal_conv1d(
            x,
            self.weight[...],
            self.bias[...],
            segment_ids=sequence.segment_ids,
            mask=sequence.padding_mask,
            sizes=sizes,
            implementation=self.implementation,
        )


class Mamba(nnx.Module):
    """Mamba-1's mixer.

    [x, gate] = u W_in; x = SiLU(conv(x)); [dt, B, C] = x W_x; dt = softplus(dt W_dt + bias);
    out = ((scan(x, dt, A, B, C) + D x) SiLU(gate) + branch(x) SiLU(gate)) W_out.

    Args:
      config: widths and precision; `sparse_arch` other than 'none' adds the branch.
      rngs: `rngs.params()` gives the initial values' keys.

    Source: Mamba (arXiv 2312.00752), section 3.4; HAX (arXiv 2507.00449), section 4.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision = Precision.named(config.precision)
        inner, state, rank = config.inner_size, config.state_size, config.time_step_rank
        settings: dict[str, Any] = {"scale": config.initializer_range, "precision": precision, "rngs": rngs}
        self.in_proj = Linear(config.hidden_size, 2 * inner, **settings)
        self.conv = CausalConv(inner, config, bound=config.conv_kernel**-0.5, rngs=rngs)
        self.x_proj = Linear(inner, rank + 2 * state, inner=True, **settings)
        self.dt_proj = Linear(
            rank, inner, kernel_bound=rank**-0.5, use_bias=True, inner=True, precision=precision, rngs=rngs
        )
        assert self.dt_proj.bias is not None
        self.dt_proj.bias[...] = initializers.time_step_bias(rngs.params(), inner, config, precision.param)
        log_states = jnp.log(jnp.arange(1, state + 1, dtype=jnp.float32))
        self.A_log = nnx.Param(jnp.tile(log_states, (inner, 1)).astype(precision.param))
        self.D = nnx.Param(jnp.ones(inner, precision.param))
        self.out_proj = Linear(inner, config.hidden_size, **settings)
        self.hax = HaxBranch(inner, config, rngs=rngs) if config.sources else None

    @jax.named_scope("mixer")
    def __call__(
        self,
        u: Float[Array, "b t d"],
        sequence: Sequence,
        *,
        draws: RoutingDraws | None = None,
        train: bool = False,
        keep: Keep | None = None,
    ) -> tuple[Float[Array, "m s d"], BranchOutput | None]:
        """Mixes u (b, t, d) along time; returns the mixed rows and what the branch did, if there is one.

        `keep` picks the positions that are wanted, as early as the mixer can do without the others.
        """
        state = self.config.state_size
        inner = self.config.inner_size
        x, gate = (part.astype(self.precision.inner) for part in self.in_proj.split(u, inner, inner))
        x = self.conv(x, sequence)
        rank_dt, B, C = jnp.split(
            self.x_proj(x), [self.config.time_step_rank, self.config.time_step_rank + state], -1
        )
        dt = self.dt_proj(rank_dt)
        A_log = self.A_log[...]
        wide_dtype = wide(A_log.dtype)
        y, _ = selective_scan(
            x,
            dt,
            -jnp.exp(A_log.astype(wide_dtype)),
            B,
            C,
            D=self.D[...],
            softplus=True,
            segment_ids=sequence.segment_ids,
            chunk_size=self.config.chunk_size,
            implementation=self.config.op_implementation,
        )
        branch = None
        if self.hax is not None:
            branch = self.hax(x, sequence, draws=draws, train=train)
            y = y + branch.output
        if keep is not None:
            y, gate = keep(y), keep(gate)
        return self.out_proj((y * jax.nn.silu(gate)).astype(self.precision.activation)), branch
