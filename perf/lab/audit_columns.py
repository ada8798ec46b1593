"""The columns of an audit's tables: of kernels, of kernels by rows, and of steps by rows."""

from __future__ import annotations

from lab.tables import Column

_USAGE = (
    Column("regs", ">5", "registers", "32-bit registers a thread"),
    Column("spill", ">6", "spills", "bytes a thread that did not fit them"),
    Column("shared", ">7", "shared", "bytes of shared memory a program"),
)
DENSE_COLUMNS = (
    Column("kernel", "<50",
           lambda r: r.kernel.removesuffix(" misaligned").replace(" gated", " *"),
           "rule, flags, dtypes of parameter/gradient/state; s: rounded stochastically, r: with a "
           "remainder; shards: of columns whose numbers are multiples of 8 (1) or not (2); * under "
           "a GradScaler, and clips and skips"),
    Column("al", ">3", "alignment", "bytes of which every address is a multiple"),
    *_USAGE,
    Column("load", ">5", "load_bits",
           "bits of the widest load on the main path, the one of whole blocks"),
    Column("store", ">6", "store_bits", "of the widest store on it"),
    Column("instr", ">6.1f", "instructions",
           "machine instructions an element on the main path: what a thread executes from entry to "
           "end, over the elements that it updates"),
    Column("+slow", ">6.0f", "with_detours",
           "the same if every division and root took its detour for zeros, subnormals and "
           "infinities"),
    Column("mem", ">5.0f", lambda r: r.memory_rate / 1e9,
           "1e9 elements/s that memory allows: bandwidth / floor"),
    Column("issue", ">6.0f", lambda r: r.issue_rate / 1e9,
           "1e9 elements/s that instruction issue allows: instructions/s / instr"),
    Column("share", ">6.2f", lambda r: r.instructions / r.fitting,
           "of the instructions that fit while memory moves an element: mem / issue"),
    Column("limit", ">7", "limit", "the smaller of the two"),
    Column("warps", ">6", "resident_warps",
           "resident warps an SM that registers and shared memory allow, in whole programs"),
    Column("KB", ">4.0f", lambda r: r.in_flight / 1000,
           "in flight an SM: warps x threads a warp x bytes that a thread waits for at a time"),
    Column("B/param", ">8.3f", "bytes_per_param",
           "bytes a parameter that an interpreted step loads and stores, tables included"),
    Column("floor", ">6", "floor",
           "gradient read once, parameter and state read once and written once"),
    Column("n", ">2", "launches", "update launches a step"),
)  # fmt: skip
ROW_COLUMNS = (
    Column("kernel", "<54", "kernel",
           "rule, flags, sparse or dense gradients, dtypes (of parameter/gradient/state where they "
           "differ), columns of a block / elements that are loaded together; gated: under a "
           "GradScaler"),
    Column("rows", ">5", "block_rows", "of a block"),
    Column("warps", ">6", "warps", "of a program"),
    *_USAGE,
    Column("load", ">5", "load_bits", "bits of the widest load of rows"),
    Column("store", ">6", "store_bits", "of the widest store of rows"),
    Column("split", ">9", lambda r: f"{r.split}/{r.accesses}",
           "how many of all loads and stores of rows (gradients, parameters, state and partial "
           "sums) are narrower than the elements that may be loaded together, or 128 bits"),
    Column("adj", ">4", "adjacent",
           "elements next to each other that a thread loads: with more than go together, a warp "
           "touches a sector again"),
    Column("instr", ">6", "instructions", "machine instructions of the kernel"),
    Column("loop", ">6", "loop", "of those, in its loop over blocks"),
    Column("progs", ">6", "resident_programs",
           "resident programs an SM that registers and shared memory allow"),
    Column("KB", ">5.0f", lambda r: r.in_flight / 1000,
           "in flight an SM at most: progs x threads x bytes that a thread waits for at a time in "
           "that loop, if no row is masked"),
)  # fmt: skip
STEP_COLUMNS = (
    Column("step", "<44", "name",
           "rule, flags, dtype, elements of a row; ids that are uniform, or one row a quarter of "
           "them; long: cut as a batch of 131,072 ids is, the others as the batch that they are"),
    Column("ids", ">5", "ids", "how many"),
    Column("rows", ">5", "rows", "that they touch"),
    Column("progs", ">6", "programs", "programs of the update"),
    Column("floor", ">8", "floor",
           "bytes: values loaded once, rows of parameter and state loaded once and stored once"),
    Column("moved", ">8", "moved", "of these"),
    Column("astray", ">7", "astray", "elements of them that were not moved exactly once"),
    Column("keys", ">6.1f", lambda r: 100 * r.keys / r.floor,
           "percent of the floor: keys, and the ids they are made of, loaded and stored by both "
           "launches"),
    Column("order", ">6.1f", lambda r: 100 * r.order / r.floor,
           "the same of where a key's values are"),
    Column("parts", ">6.1f", lambda r: 100 * r.partials / r.floor, "the same of partial sums"),
    Column("tables", ">7.1f", lambda r: 100 * r.tables / r.floor, "the same of all else"),
    Column("over", ">6.1f", lambda r: 100 * r.total / r.floor - 100, "all of that"),
    Column("B/row", ">8.1f", lambda r: r.total / r.rows, "bytes a touched row, all in all"),
    Column("B/el", ">6.2f", lambda r: r.total / r.rows / r.width, "bytes a touched element"),
)  # fmt: skip
