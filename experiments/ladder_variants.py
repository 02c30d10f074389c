"""What experiments/ladder.py trains: settings to change, and what each was expected to do."""

import dataclasses
from typing import Any

HAX = "sign_bin_lsh+key_selection"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Settings to change, below `model` and `training`, and what that should do, written before the run.

    `shares` are fields of `training` in steps, given as shares of all steps.
    """

    prediction: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)


_Settings = dict[str, Any]
_LSH: _Settings = {"sparse_arch": "sign_bin_lsh", "sparse_keys": 32}
# From one bit to all eight within half of the steps.
_SCHEDULE: _Settings = {"training": {"hash_bits": 1}, "shares": {"hash_bits_every": 1 / 14}}
_LOSS = {"hash_loss_weight": 1.0}
_SCHEDULE_LOSS: _Settings = {**_SCHEDULE, "training": {**_SCHEDULE["training"], **_LOSS}}
_WIDE = {**_LSH, "sparse_keys": 256}

VARIANTS = {
    "hax": Variant("The reference: 8 bits, 64 keys. Hashing shows few answers, key selection more."),
    "base": Variant(
        "No sparse branch: as fast as the reference if the recurrent state alone holds the table, far behind "
        "if attention does the work.",
        model={"sparse_arch": "none"},
    ),
    "bits4": Variant(
        "16 buckets in place of 256: many more answers collide with their query, so that hashing gets a "
        "gradient; its recall rises and the plateau ends earlier.",
        model={"num_hash": 4},
    ),
    "bits2": Variant(
        "4 buckets: nearly every answer may collide, limited by the keys that a query may see.",
        model={"num_hash": 2},
    ),
    "lsh": Variant(
        "Hashing alone with 32 keys: what it learns without key selection beside it.",
        model={"sparse_arch": "sign_bin_lsh", "sparse_keys": 32},
    ),
    "lsh_bits3": Variant(
        "Hashing alone with 8 buckets and 32 keys: recall well above that with 8 bits, and accuracy with it.",
        model={"sparse_arch": "sign_bin_lsh", "sparse_keys": 32, "num_hash": 3},
    ),
    "keys8": Variant(
        "8 keys in all: if attention to the answer were what solves the task, far behind the reference.",
        model={"sparse_keys": 8},
    ),
    "base_state4": Variant(
        "No sparse branch and an eighth of the state: too little for the table, so below the reference.",
        model={"sparse_arch": "none", "state_size": 4},
    ),
    "hax_state4": Variant(
        "An eighth of the state, which makes retrieval worth more: recall rises above that of the reference.",
        model={"state_size": 4},
    ),
    "fast": Variant(
        "Second moment forgotten in 50 steps (adam_b2 0.98): plateaus end earlier.",
        training={"adam_b2": 0.98},
    ),
    # What dense attention would learn in the branch's place: hashing can hope for no more.
    "full": Variant(
        "Attention to all keys: solves the table, faster than the reference; what hashing then misses, it "
        "misses because of its codes.",
        model={"sparse_arch": "full"},
    ),
    "full_state4": Variant(
        "Attention to all keys beside an eighth of the state: solves the table all the same, by looking the "
        "answer up.",
        model={"sparse_arch": "full", "state_size": 4, "key_size": 32},
    ),
    "full_shared_unit": Variant(
        "Attention to all keys by cosines, one matrix for queries and keys: as good as with two matrices, so "
        "that tying them for the sake of hashing costs nothing.",
        model={"sparse_arch": "full", "query_key": "shared", "unit_norm": True},
    ),
    # One change each to the reference.
    "tied_init": Variant(
        "Queries and keys start by the same matrix, so equal inputs start with equal codes: hashing's recall "
        "starts above the reference and may stay there; accuracy as the reference.",
        model={"query_key": "tied_init"},
    ),
    "shared": Variant(
        "One matrix for queries and keys: recall by hashing above tied_init, as training cannot part them; "
        "accuracy as the reference, because key selection does the work.",
        model={"query_key": "shared"},
    ),
    "shared_bits4": Variant(
        "One matrix and 16 buckets: hashing's recall highest among the changes to the reference alone.",
        model={"query_key": "shared", "num_hash": 4},
    ),
    "orthogonal": Variant(
        "Orthogonal directions spread codes a little more evenly: no visible effect.",
        model={"projection": "orthogonal"},
    ),
    "unit": Variant(
        "Cosines for scores: what attention likes is then what hashes alike; a little more recall, no more "
        "accuracy.",
        model={"unit_norm": True},
    ),
    "centred": Variant(
        "Without the running mean, which queries share with queries and keys with keys, buckets fill evenly: "
        "fewer empty ones, recall at chance level (32 of 256 buckets' keys) or a little above.",
        model={"centring": "running"},
    ),
    "schedule": Variant(
        "One bit at first and all eight by half time: hashing shows most answers early, attention learns to "
        "use them, and recall falls less than it rose.",
        **_SCHEDULE,
    ),
    "hash_loss": Variant(
        "A tenth of the hash loss: codes follow what attention likes, but attention rests on what key "
        "selection shows; recall by hashing a few times the reference's, accuracy as there.",
        training={"hash_loss_weight": 0.1},
    ),
    "hash_loss1": Variant(
        "The whole hash loss: more recall than a tenth, and no less accuracy, since the layers before are "
        "left alone.",
        training=_LOSS,
    ),
    "schedule_hash_loss": Variant(
        "Large buckets first, and codes that follow attention: recall rises early and stays.",
        **_SCHEDULE_LOSS,
    ),
    "learned": Variant(
        "Directions learned by the hash loss, apart for queries and keys, so that attention itself is left "
        "alone: more recall by hashing than hash_loss1, accuracy as the reference.",
        model={"projection": "learned"},
        training=_LOSS,
    ),
    "gate0": Variant(
        "The key scorer untrained: key selection keeps arbitrary keys; slower than the reference.",
        training={"gate_loss_weight": 0.0},
    ),
    "gate1": Variant(
        "Ten times the gate loss: it reaches the scorer alone and AdamW ignores its scale; as the reference.",
        training={"gate_loss_weight": 1.0},
    ),
    "lsh64": Variant(
        "The whole budget of 64 keys for hashing: no better than 32, since buckets hold fewer.",
        model={"sparse_arch": "sign_bin_lsh"},
    ),
    "ks64": Variant(
        "The whole budget for key selection: at least as good as the reference where 64 keys hold the table.",
        model={"sparse_arch": "key_selection"},
    ),
    "hax_state4_keys32": Variant(
        "An eighth of the state, but 32 features for queries and keys: between hax_state4 and the reference.",
        model={"state_size": 4, "key_size": 32},
    ),
    # Hashing alone, which shows most clearly whether it retrieves.
    "lsh_tied_init": Variant(
        "Hashing alone, matrices that start equal: recall starts high and decays as they part.",
        model={**_LSH, "query_key": "tied_init"},
    ),
    "lsh_shared": Variant(
        "Hashing alone, one matrix: codes agree by their common mean, so that buckets are few and full; "
        "recall far above `lsh`, like a window's.",
        model={**_LSH, "query_key": "shared"},
    ),
    "lsh_orthogonal": Variant(
        "Hashing alone, orthogonal directions: as `lsh`.", model={**_LSH, "projection": "orthogonal"}
    ),
    "lsh_centred": Variant(
        "Hashing alone, running means taken off: fewer empty buckets than `lsh`, recall still low.",
        model={**_LSH, "centring": "running"},
    ),
    "lsh_shared_centred": Variant(
        "Hashing alone, one matrix, means taken off: full buckets split by content; equal inputs collide.",
        model={**_LSH, "query_key": "shared", "centring": "running"},
    ),
    "lsh_shared_bits4": Variant(
        "Hashing alone, one matrix, 16 buckets: recall and accuracy above `lsh_shared`.",
        model={**_LSH, "query_key": "shared", "num_hash": 4},
    ),
    "lsh_schedule": Variant(
        "Hashing alone, from 2 to 256 buckets by half time: attention learns to look up while buckets are "
        "large, and the codes of what it looks up agree when they get small; recall well above `lsh`.",
        model=_LSH,
        **_SCHEDULE,
    ),
    "lsh_schedule_wide": Variant(
        "As lsh_schedule with up to 256 keys of a bucket visible, all of them at first and few at the end: "
        "the answer is never out of the window; the best of the schedules.",
        model=_WIDE,
        **_SCHEDULE,
    ),
    "lsh_shared_unit_schedule_wide": Variant(
        "As lsh_schedule_wide by cosines and one matrix: attention can raise a score only by turning the two "
        "vectors towards each other, which is what makes codes agree; recall highest without a further loss.",
        model={**_WIDE, "query_key": "shared", "unit_norm": True},
        **_SCHEDULE,
    ),
    "lsh_unit_centred_schedule_wide": Variant(
        "As lsh_schedule_wide by cosines, means taken off, two matrices: as with one, a little slower.",
        model={**_WIDE, "unit_norm": True, "centring": "running"},
        **_SCHEDULE,
    ),
    "lsh_hash_loss": Variant(
        "Hashing alone with a tenth of the hash loss: while attention is flat it wants buckets of about "
        "four keys, fuller than 256 random ones of small tables; recall well above `lsh` from the start.",
        model=_LSH,
        training={"hash_loss_weight": 0.1},
    ),
    "lsh_hash_loss1": Variant(
        "Hashing alone with the whole hash loss: as with a tenth, sooner.",
        model=_LSH,
        training=_LOSS,
    ),
    "lsh_hash_loss1_keys32": Variant(
        "The whole hash loss that wants 32 keys in a bucket: on tables of 4 x 4, with 73 positions, all keys "
        "fall into one bucket and attention is dense; on larger ones a window of content.",
        model={**_LSH, "hash_loss_keys": 32},
        training=_LOSS,
    ),
    "lsh_shared_hash_loss1": Variant(
        "Hashing alone, one matrix, the whole hash loss: above lsh_hash_loss1, since matches start alike.",
        model={**_LSH, "query_key": "shared"},
        training=_LOSS,
    ),
    "lsh_schedule_wide_hash_loss1": Variant(
        "As lsh_schedule_wide with the whole hash loss: what attention learnt to look up while it saw all "
        "keeps its place in the bucket as bits come; recall above half at the end.",
        model=_WIDE,
        **_SCHEDULE_LOSS,
    ),
    "lsh_unit_schedule_hash_loss1": Variant(
        "Cosines, large buckets first in a window of 32 keys, the whole hash loss: the loss then means the "
        "best keys of each query; recall highest among the forms that never see more than 32.",
        model={**_LSH, "unit_norm": True},
        **_SCHEDULE_LOSS,
    ),
    "lsh_learned": Variant(
        "Hashing alone, learned directions: they follow attention, which at 256 buckets misses the answer; "
        "recall above lsh_hash_loss1, accuracy little above `lsh`.",
        model={**_LSH, "projection": "learned"},
        training=_LOSS,
    ),
    "lsh_learned_schedule": Variant(
        "As lsh_learned with large buckets first, in a window of 32 keys: recall far above lsh_schedule.",
        model={**_LSH, "projection": "learned"},
        **_SCHEDULE_LOSS,
    ),
    "lsh_learned_schedule_wide": Variant(
        "Attention to nearly all keys first, learned directions that find its favourites when bits come: the "
        "best of hashing alone, recall above two thirds.",
        model={**_WIDE, "projection": "learned"},
        **_SCHEDULE_LOSS,
    ),
    "lsh_learned_unit_schedule_wide": Variant(
        "The same by cosines: a little more recall, since eight signs tell directions, not lengths.",
        model={**_WIDE, "projection": "learned", "unit_norm": True},
        **_SCHEDULE_LOSS,
    ),
    "lsh_state4": Variant(
        "Hashing alone beside an eighth of the state, 32 features for keys: little else can hold the table, "
        "and still hashing does not find it; far below `lsh`.",
        model={**_LSH, "state_size": 4, "key_size": 32},
    ),
    "lsh_state4_shared": Variant(
        "As lsh_state4 with one matrix: above it, if tying alone makes hashing retrieve.",
        model={**_LSH, "state_size": 4, "key_size": 32, "query_key": "shared"},
    ),
    "lsh_state4_schedule_wide": Variant(
        "As lsh_state4 with large buckets at first: well above it, carried by retrieval.",
        model={**_WIDE, "state_size": 4, "key_size": 32},
        **_SCHEDULE,
    ),
    "lsh_state4_schedule_wide_hash_loss1": Variant(
        "As lsh_state4_schedule_wide with the whole hash loss: no fall of accuracy as bits come; the nearest "
        "to full_state4.",
        model={**_WIDE, "state_size": 4, "key_size": 32},
        **_SCHEDULE_LOSS,
    ),
    "lsh_state4_learned_schedule_wide": Variant(
        "As lsh_learned_schedule_wide beside an eighth of the state: at least half of the answers come by "
        "hashing, far above lsh_state4; the best sign that hashing can do the work.",
        model={**_WIDE, "state_size": 4, "key_size": 32, "projection": "learned"},
        **_SCHEDULE_LOSS,
    ),
}
