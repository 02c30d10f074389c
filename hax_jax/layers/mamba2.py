"""The mixer of Mamba-2, with the sparse attention branch where the configuration has one."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hax_jax.config import ModelConfig
from hax_jax.layers import initializers
from hax_jax.layers.hax import BranchOutput, HaxBranch, RoutingDraws
from hax_jax.layers.linear import Linear
from hax_jax.layers.mamba import CausalConv
from hax_jax.layers.norms import GatedRMSNorm
from hax_jax.layers.precision import Precision
from hax_jax.layers.sequence import Keep, Sequence
from hax_jax.ops import ssd
from hax_jax.ops.numerics import wide


class Mamba2(nnx.Module):
    """Mamba-2's mixer.

    [gate, x, B, C, dt] = u W_in; [x, B, C] = SiLU(conv([x, B, C])); dt = softplus(dt + bias);
    out = gated_rms_norm(SSD(x, dt, A, B, C) + D x + branch(x), gate) W_out.

    Args:
      config: widths and precision; `sparse_arch` other than 'none' adds the branch.
      rngs: `rngs.params()` gives the initial values' keys.

    Source: Mamba-2 (arXiv 2405.21060), section 7; HAX (arXiv 2507.00449), section 4.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.precision = precision = Precision.named(config.precision)
        inner, heads = config.inner_size, config.num_heads
        self._bc_size = config.n_groups * config.state_size
        conv_size = inner + 2 * self._bc_size
        scale = config.initializer_range
        in_size = inner + conv_size + heads
        self.in_proj = Linear(config.hidden_size, in_size, scale=scale, precision=precision, rngs=rngs)
        self.conv = CausalConv(conv_size, config, scale=scale, rngs=rngs)
        self.dt_bias = nnx.Param(initializers.time_step_bias(rngs.params(), heads, config, precision.param))
        self.A_log = nnx.Param(jnp.log(jnp.arange(1, heads + 1, dtype=jnp.float32)).astype(precision.param))
        self.D = nnx.Param(jnp.ones(heads, precision.param))
        self.norm = GatedRMSNorm(
            inner, eps=config.norm_eps, precision=precision, implementation=config.op_implementation
        )
        # The original shrinks what the residual stream receives, so that depth does not add up.
        bound = inner**-0.5 * config.num_layers**-0.5
        self.out_proj = Linear(inner, config.hidden_size, kernel_bound=bound, precision=precision, rngs=rngs)
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
        config = self.config
        inner, heads = config.inner_size, config.num_heads
        conv_size = inner + 2 * self._bc_size
        gate, conv_in, dt = self.in_proj.split(sequence.hide_pads(u), inner, conv_size, heads)
        gate, conv_in = gate.astype(self.precision.inner), conv_in.astype(self.precision.inner)
        dt = dt.astype(self.precision.activation)
        x, B, C = self.conv(conv_in, sequence, (inner, self._bc_size, self._bc_size))

        wide_dtype = wide(self.A_log.dtype)
        by_head = x.reshape(*x.shape[:2], heads, config.head_dim)
        by_group = (*x.shape[:2], config.n_groups, config.state_size)
        matmul = self.precision.matmul
        y, _ = ssd(
            by_head.astype(matmul),
            dt,
            -jnp.exp(self.A_log[...].astype(wide_dtype)),
            B.reshape(by_group).astype(matmul),
            C.reshape(by_group).astype(matmul),
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            segment_ids=sequence.segment_ids,
            chunk_size=config.chunk_size,
            implementation=config.op_implementation,
        )
        y = y.reshape(x.shape)
        branch = None
        if self.hax is not None:
            branch = self.hax(x, sequence, draws=draws, train=train)
            y = y + branch.output
        if self.hax is not None or keep is not None:
            # What is written before the norm. Otherwise its kernels read what the recurrence has written.
            y = y.astype(self.precision.inner)
        if keep is not None:
            y, gate = keep(y), keep(gate)
        return self.out_proj(self.norm(y, gate)), branch
