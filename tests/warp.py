"""A block of GPU threads in NumPy: the functions of `nbattn.cuda.ptx`, each for all threads at once.

A kernel is built with a `Machine` in place of that module, and its own Python source runs. What differs
between threads is an array with an element for each; what does not is a plain number, and so loops and ifs
must be the same for the whole block. Fragments lie as the PTX ISA says ("Matrix fragments for mma").

All threads take a step together, which no real ones do. What they may not rely on is checked instead: a word
of shared memory must not be touched by two threads, one of them writing, with no barrier between; a copy is
seen by its own thread once waited for, and by others after a barrier; memory is read only where an array
lies, and written once. Bank conflicts are counted. Approximate instructions are off by what the ISA allows.
Where it leaves open how tensor cores round, sums are cut off, as real ones do (Fasi et al., 2021,
https://doi.org/10.7717/peerj-cs.330).
"""

from types import SimpleNamespace

import ml_dtypes
import numpy as np

HALVES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LANES = np.arange(32)
WRITTEN, FENCED, MET = range(3)
"""What has become of what a block wrote for others: a fence, a barrier after it."""
HEAP = 1 << 44
"""Where global memory begins: an address that was cut to 32 bits is none."""


class Race(AssertionError):
    """Two threads touch shared memory, and nothing orders them."""


def wrap(x):
    """The low 32 bits as a signed number, as Python ints and int64 arrays."""
    if isinstance(x, np.ndarray):
        return ((x.astype(np.int64) + 0x80000000) & 0xFFFFFFFF) - 0x80000000
    return ((int(x) + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def toward_zero(x):
    """float64 as float32 without the bits that it has no room for."""
    y = x.astype(np.float32)
    return np.where((np.abs(y) > np.abs(x)) & np.isfinite(y), np.nextafter(y, np.float32(0)), y)


class Registers:
    """An array of each thread's own, indexed by constants."""

    def __init__(self, count, dtype, threads):
        self.data = np.zeros((count, threads), dtype)
        self.known = np.zeros(count, bool)

    def __getitem__(self, i):
        return self.read(i, 1)[0].copy()

    def __setitem__(self, i, x):
        self.write(i, x, 1)

    def read(self, i, count):
        assert 0 <= i <= len(self.data) - count, "a fragment ends there"
        assert self.known[i : i + count].all(), "a register is read that nothing wrote"
        return self.data[i : i + count]

    def write(self, i, x, count):
        assert 0 <= i <= len(self.data) - count, "a fragment ends there"
        self.data[i : i + count] = x
        self.known[i : i + count] = True


def _places(shape, columns):
    """Where the (row, column) of a matrix lies among fragment words, lanes and halves, as one index."""
    index = np.full(shape, -1)
    for k, (row, column) in enumerate(columns):
        halves = column.shape[-1]
        index[row, column] = (k * 32 * halves) + np.arange(32 * halves).reshape(column.shape)
    assert (index >= 0).all()
    return index


G, Q = LANES[:, None] // 4, LANES[:, None] % 4
PAIR = 2 * Q + np.arange(2)
# The matrices of mma.sync: for each word of a fragment the rows and columns of its elements, by lane.
A16 = _places((16, 16), [(G, PAIR), (G + 8, PAIR), (G, PAIR + 8), (G + 8, PAIR + 8)])
B16 = _places((8, 16), [(G, PAIR), (G, PAIR + 8)]).T
A8 = _places((16, 8), [(G, Q), (G + 8, Q), (G, Q + 4), (G + 8, Q + 4)])
B8 = _places((8, 8), [(G, Q), (G, Q + 4)]).T
C_ROWS = np.concatenate([G.T, G.T, G.T + 8, G.T + 8])
C_COLUMNS = np.concatenate([2 * Q.T, 2 * Q.T + 1] * 2)


class Machine:
    """The threads of a block, its shared memory, and global memory."""

    def __init__(self, threads, shared_bytes):
        self.threads, self.warps = threads, threads // 32
        self.ids = np.arange(threads)
        self.cuda = SimpleNamespace(local=SimpleNamespace(array=self._registers))
        self.heap = np.zeros(0, np.uint8)
        self.readable, self.writable = np.zeros(0, bool), np.zeros(0, bool)
        self.shared_by_blocks = np.zeros(0, bool)
        self.published, self.writer = np.zeros(0, int), np.zeros(0, int)
        self.outputs = []
        self.shared_bytes = shared_bytes
        self.conflicts = {}
        self.counts = {}

    # --- outside the kernel ---

    def place(self, array, *, output=False):
        """A copy of the array in global memory: its address. Strides are the array's own."""
        low, high = np.lib.array_utils.byte_bounds(array)
        at, size = len(self.heap) + 256 - len(self.heap) % 256, high - low
        # As an array's start need not be aligned, so its copy's is where the array's was.
        at += low % 16
        start = at + array.__array_interface__["data"][0] - low
        grown = at + size + 256
        for name, fill in (
            ("heap", 0xA5),
            ("readable", False),
            ("writable", False),
            ("shared_by_blocks", False),
            ("published", MET),
            ("writer", -1),
        ):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full(grown - len(old), fill, old.dtype)]))
        strides = (*array.strides, 1)
        shape = (*array.shape, array.itemsize)
        for name, x in (("heap", None), ("readable", not output), ("writable", output)):
            view = np.lib.stride_tricks.as_strided(getattr(self, name)[start:], shape, strides)
            view[...] = np.asarray(array[..., None]).view(np.uint8) if x is None else x
        if output:
            self.outputs.append((array, start))
        return HEAP + start

    def workspace(self, array):
        """Where blocks write for one another; of what is in the array at first only zeros may be read."""
        address = self.place(array)
        part = slice(address - HEAP, address - HEAP + array.nbytes)
        self.readable[part] = array.view(np.uint8).ravel() == 0
        self.writable[part] = self.shared_by_blocks[part] = True
        return address

    def _registers(self, count, kind):
        return Registers(count, np.float32 if kind == self.float32 else np.int64, self.threads)

    def run(self, kernel, parameters, blocks):
        with np.errstate(all="ignore"):
            for number in blocks:
                self._start(number)
                kernel(parameters)
                assert not self.pending.any(), "a block ends before its copies"

    def fetch(self):
        """Write what kernels wrote into the output arrays; every element must have been written, once."""
        for array, start in self.outputs:
            shape, strides = (*array.shape, array.itemsize), (*array.strides, 1)
            left = np.lib.stride_tricks.as_strided(self.writable[start:], shape, strides)
            assert not left.any(), f"{left.sum()} bytes of {left.size} were not written"
            view = np.lib.stride_tricks.as_strided(self.heap[start:], shape, strides)
            array[...] = np.ascontiguousarray(view).view(array.dtype)[..., 0]

    def _start(self, number):
        self.number, self.counted, self.acquired = number, False, False
        words = self.shared_bytes // 4
        self.shared = np.full(self.shared_bytes, 0xFF, np.uint8)  # NaN
        self.written_by, self.written_at = np.full(words, -1), np.full((words, 2), -1)
        self.read_by, self.read_at = np.full(words, -1), np.full((words, 2), -1)
        self.read_by_several, self.read_by_warps = np.zeros(words, bool), np.zeros(words, bool)
        self.pending = np.zeros(words, bool)
        self.open, self.groups = [], []
        self.epoch = np.zeros(2, int)

    # --- what orders accesses ---

    @staticmethod
    def _race(what):
        msg = f"shared memory is {what}"
        raise Race(msg)

    def _unordered(self, by, at, threads):
        """Which words' last access, by thread `by` at time `at`, nothing orders before these threads."""
        same_thread, same_warp = by == threads, by // 32 == threads // 32
        now = (at[..., 0] == self.epoch[0]) & (by >= 0)
        return now & ~same_thread & ~(same_warp & (at[..., 1] < self.epoch[1]))

    def _words(self, addresses, size, threads):
        addresses = np.asarray(addresses)
        assert (addresses % size == 0).all(), "an address of shared memory is not aligned"
        assert ((addresses >= 0) & (addresses + size <= self.shared_bytes)).all(), "beyond shared memory"
        words = addresses[..., None] // 4 + np.arange(size // 4)
        return words, np.broadcast_to(threads[..., None], words.shape)

    def _read_shared(self, addresses, size, threads):
        words, threads = self._words(addresses, size, threads)
        if self.pending[words].any():
            self._race("read that a copy may not have reached")
        assert (self.written_by[words] >= 0).all(), "shared memory is read that nothing wrote"
        if self._unordered(self.written_by[words], self.written_at[words], threads).any():
            self._race("read that another thread wrote, with no barrier between")
        words, threads = words.ravel(), threads.ravel()
        older = (self.read_at[words] != self.epoch).any(-1)
        # Reads of the same time are joined; of an older time of this epoch only by other warps they count.
        other_epoch = self.read_at[words, 0] != self.epoch[0]
        self.read_by_several[words[older]] = False
        self.read_by_warps[words[other_epoch]] = False
        other_warp = ~other_epoch & (self.read_by[words] // 32 != threads // 32)
        first = np.full(len(self.read_by), -1)
        first[words] = threads
        several = first[words] != threads
        self.read_by_several[words[several | (~older & (self.read_by[words] != threads))]] = True
        self.read_by_warps[words[other_warp | (several & (first[words] // 32 != threads // 32))]] = True
        self.read_by[words], self.read_at[words] = threads, self.epoch
        return self.shared[words[:, None] * 4 + np.arange(4)].reshape(*np.shape(addresses), size)

    def _claim(self, addresses, size, threads, *, atomic=False):
        """Check that these threads may write there, and note that they did."""
        words, threads = self._words(addresses, size, threads)
        words, threads = words.ravel(), threads.ravel()
        if self.pending[words].any():
            self._race("written that a copy may yet reach")
        if not atomic:
            assert len(np.unique(words)) == len(words), "two threads write one word"
            if self._unordered(self.written_by[words], self.written_at[words], threads).any():
                self._race("written that another thread wrote, with no barrier between")
        now = self.read_at[words, 0] == self.epoch[0]
        since = self.read_at[words, 1] == self.epoch[1]
        same_warp = self.read_by[words] // 32 == threads // 32
        alone = ~self.read_by_several[words] & (self.read_by[words] == threads)
        if (now & (self.read_by_warps[words] | ~same_warp | (since & ~alone))).any():
            self._race("written that another thread read, with no barrier between")
        self.written_by[words], self.written_at[words] = threads, self.epoch
        return words

    def _conflict(self, name, addresses, size):
        """Count the passes that a warp's access needs beyond those of its bytes: 128 in each."""
        for group in addresses.reshape(-1, 128 // size) // 4:
            banks = np.unique(group[:, None] + np.arange(size // 4)) % 32
            self.conflicts[name] = self.conflicts.get(name, 0) + np.bincount(banks).max() - 1
            self.counts[name] = self.counts.get(name, 0) + 1

    # --- numbers ---

    def int32(self, x):
        return wrap(x)

    def int64(self, x):
        return x.astype(np.int64) if isinstance(x, np.ndarray) else int(x)

    def float32(self, x):
        return np.float32(x)

    jit = staticmethod(lambda function: function)

    def unroll(self):
        pass

    def thread(self):
        return self.ids

    reread_thread = thread

    def same(self, x):
        assert np.all(x == np.ravel(x)[0]), "threads have different numbers"
        return int(np.ravel(x)[0])

    def quotient(self, x, y):
        return x // y

    def flip(self, x, y):
        return x ^ y

    def block(self):
        return self.number

    reread_block = block

    def _lanes(self, x, dtype=None):
        return np.broadcast_to(np.asarray(x, dtype), self.threads)

    def _number(self, function, *x):
        x = [np.asarray(y, np.float32) for y in x]
        return function(*x).astype(np.float32)[()]

    def _flushed(self, function, x):
        """Numbers below the least normal one are 0."""
        tiny = np.finfo(np.float32).tiny
        flush = lambda y: np.where(np.abs(y) < tiny, np.copysign(np.float32(0), y), y)  # noqa: E731
        return self._number(lambda y: flush(function(flush(y))), x)

    @staticmethod
    def _wrong(y, by):
        """y, off by as much as the ISA allows, up or down; what is exact on any device stays so."""
        mantissa = y.view(np.uint32) & 0x7FFFFF
        return np.where(mantissa == 0, y, y + np.where(mantissa & 1, by, -by).astype(np.float32))

    def exp2(self, x):
        return self._flushed(lambda x: self._wrong(y := np.exp2(x), 2.0**-22 * y), x)

    def log2(self, x):
        return self._flushed(lambda x: self._wrong(y := np.log2(x), 2.0**-22 * np.maximum(np.abs(y), 1)), x)

    def reciprocal(self, x):
        return self._flushed(lambda x: self._wrong(y := np.reciprocal(x), 2.0**-23 * y), x)

    def tanh(self, x):
        return self._number(np.tanh, x)

    def maximum(self, x, y):
        return self._number(np.fmax, x, y)

    def fma(self, x, y, z):
        return self._number(lambda x, y, z: x.astype(float) * y + z, x, y, z)

    def smaller(self, x, y):
        return np.minimum(x, y)[()]

    def larger(self, x, y):
        return np.maximum(x, y)[()]

    def select(self, condition, x, y):
        return self._number(lambda x, y: np.where(condition, x, y), x, y)

    def select_int(self, condition, x, y):
        return np.where(condition, x, y).astype(np.int64)[()]

    def _pack(self, dtype, low, high):
        halves = np.stack(np.broadcast_arrays(low, high), -1).astype(np.float32).astype(dtype)
        return wrap(halves.view(np.uint32)[..., 0])

    def _half(self, dtype, word, shift):
        return (np.asarray(word) >> shift & 0xFFFF).astype(np.uint16).view(dtype).astype(np.float32)[()]

    def pack_f16(self, low, high):
        return self._pack(np.float16, low, high)

    def pack_bf16(self, low, high):
        return self._pack(ml_dtypes.bfloat16, low, high)

    def top_halves(self, x, y):
        return wrap((np.asarray(x) >> 16 & 0xFFFF) | (np.asarray(y) >> 16 & 0xFFFF) << 16)

    def below_half(self, x):
        number, top = self.number_of(x), self.number_of(np.asarray(x) & ~0xFFFF)
        rest = np.asarray(number - top, np.float32)
        return self.word_of(np.where(np.isnan(rest), np.float32(0), rest))

    def _two_bytes(self, word, i, j):
        data = self._lanes(word).astype(np.int32)[:, None].view(np.int8)
        return self._pack(ml_dtypes.bfloat16, data[:, i], data[:, j])

    def bytes_01(self, word):
        return self._two_bytes(word, 0, 1)

    def bytes_23(self, word):
        return self._two_bytes(word, 2, 3)

    def bytes_02(self, word):
        return self._two_bytes(word, 0, 2)

    def bytes_13(self, word):
        return self._two_bytes(word, 1, 3)

    def nibbles(self, word, shift):
        word = self._lanes(word).astype(np.int64) >> shift
        return self._pack(ml_dtypes.bfloat16, (word & 15) - 8.0, (word >> 16 & 15) - 8.0)

    def cut(self, x):
        return (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)[()]

    def word_of(self, x):
        return wrap(np.asarray(x, np.float32).view(np.uint32))[()]

    def number_of(self, word):
        return wrap(np.asarray(word)).astype(np.int32).view(np.float32)[()]

    def low_f16(self, word):
        return self._half(np.float16, word, 0)

    def high_f16(self, word):
        return self._half(np.float16, word, 16)

    def low_bf16(self, word):
        return self._half(ml_dtypes.bfloat16, word, 0)

    def high_bf16(self, word):
        return self._half(ml_dtypes.bfloat16, word, 16)

    # --- threads together ---

    def barrier(self):
        self.epoch += 1
        self.published[self.published == FENCED] = MET

    def barrier_any(self, x):
        self.barrier()
        return bool(np.any(x))

    def warp_barrier(self):
        self.epoch[1] += 1

    def any_lane(self, x):
        """More than is asked, any of the block: kernels do nothing then for lanes where x does not hold."""
        return bool(np.any(x))

    def exchange(self, x, distance):
        return self._lanes(x).reshape(-1, 32)[:, LANES ^ distance].ravel()

    exchange_word = exchange

    def _multiply(self, c, ci, a, ai, b, bi, a_places, b_places, decode):
        def matrices(registers, i, count, places):
            words = registers.read(i, count).reshape(count, self.warps, 32).swapaxes(0, 1)
            numbers = decode(words.astype(np.uint32))
            return numbers.reshape(self.warps, -1)[:, places].astype(float)

        a_matrix, b_matrix = matrices(a, ai, 4, a_places), matrices(b, bi, 2, b_places)
        product = a_matrix @ b_matrix
        parts = product[:, C_ROWS, C_COLUMNS].swapaxes(0, 1).reshape(4, -1)
        c.write(ci, toward_zero(c.read(ci, 4) + parts), 4)

    def multiply_f16(self, *x):
        self._multiply(*x, A16, B16, lambda words: words.view(np.float16))

    def multiply_bf16(self, *x):
        self._multiply(*x, A16, B16, lambda words: words.view(ml_dtypes.bfloat16))

    def multiply_tf32(self, *x):
        self._multiply(*x, A8, B8, lambda words: (words & 0xFFFFE000).view(np.float32))

    # --- shared memory ---

    def shared_memory(self):
        return 0

    def load_shared(self, address):
        if np.ndim(address) == 0:
            return int(self._read_shared(np.full(self.threads, address), 4, self.ids)[0].view(np.int32)[0])
        self._conflict("load", address, 4)
        return self._read_shared(address, 4, self.ids).view(np.int32)[:, 0].astype(np.int64)

    def load_shared_float(self, address):
        address = self._lanes(address)
        self._conflict("load", address, 4)
        return self._read_shared(address, 4, self.ids).view(np.float32)[:, 0]

    def _wanted(self, wanted, *x):
        wanted = self._lanes(wanted, bool)
        return wanted, *(self._lanes(y)[wanted] for y in x)

    def store_shared(self, address, x, wanted):
        if np.all(wanted):
            self._conflict("store", self._lanes(address), 4)
        wanted, address, x, threads = self._wanted(wanted, address, x, self.ids)
        words = self._claim(address, 4, threads)
        self.shared.view(np.int32)[words] = x

    def store_shared_float(self, address, x, wanted):
        self.store_shared(address, self._lanes(x, np.float32).copy().view(np.int32), wanted)

    def or_shared(self, address, x):
        words = self._claim(self._lanes(address), 4, self.ids, atomic=True)
        np.bitwise_or.at(self.shared.view(np.int32), words, self._lanes(x).astype(np.int32))

    def _load_matrices(self, fragment, index, address, turned):
        address = self._lanes(address)
        self._conflict("ldmatrix", address, 16)
        rows = self._read_shared(address, 16, self.ids).view(np.uint16).reshape(self.warps, 4, 8, 8)
        if turned:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows).view(np.uint32)  # of columns: (warps, 4, 8, 4)
        fragment.write(index, wrap(pairs.reshape(self.warps, 4, 32).swapaxes(0, 1).reshape(4, -1)), 4)

    def load_matrices(self, fragment, index, address):
        self._load_matrices(fragment, index, address, False)

    def load_matrices_turned(self, fragment, index, address):
        self._load_matrices(fragment, index, address, True)

    def copy_async(self, shared, address, size):
        size, address = self._lanes(size), self._lanes(address)
        assert ((size >= 0) & (size <= 16)).all()
        assert (address[size > 0] % 16 == 0).all(), "a copy's address is not aligned"
        part = np.arange(16) < size[:, None]
        data = np.zeros((self.threads, 16), np.uint8)
        data[part] = self._global((address[:, None] + np.arange(16))[part])
        self._conflict("copy", self._lanes(shared), 16)
        words = self._claim(self._lanes(shared), 16, self.ids)
        self.pending[words] = True
        self.open.append((words, data))

    def copy_word_async(self, shared, address, size, wanted):
        wanted, shared, address, size, threads = self._wanted(wanted, shared, address, size, self.ids)
        assert np.isin(size, (0, 4)).all()
        data = np.zeros((len(size), 4), np.uint8)
        data[size > 0] = self._global(address[size > 0, None] + np.arange(4))
        words = self._claim(shared, 4, threads)
        self.pending[words] = True
        self.open.append((words, data))

    def commit_copies(self):
        self.groups.append(self.open)
        self.open = []

    def wait_copies(self):
        self.wait_older(0)()

    def wait_older(self, left):
        def wait():
            groups, self.groups = self.groups[: len(self.groups) - left], self.groups[-left:] if left else []
            for words, data in (copy for group in groups for copy in group):
                self.shared.view(np.uint32)[words] = data.view(np.uint32).ravel()
                self.pending[words] = False
                self.written_at[words] = self.epoch

        return wait

    # --- global memory ---

    def _global(self, addresses):
        at = addresses - HEAP
        inside = ((at >= 0) & (at < len(self.heap))).all()
        assert inside, "no array lies there"
        assert self.readable[at].all(), "no array lies there"
        others = (self.writer[at] >= 0) & (self.writer[at] != self.number)
        assert self.acquired or not others.any(), "what another block wrote is read before a fence"
        return self.heap[at]

    def _load(self, address, wanted, dtype):
        size = np.dtype(dtype).itemsize
        if np.ndim(address) == 0 and np.ndim(wanted) == 0:
            return self._global(address + np.arange(size)).view(dtype)[0] if wanted else dtype(0)
        result = np.zeros(self.threads, dtype)
        wanted, address = self._wanted(wanted, address)
        assert (address % size == 0).all(), "an address is not aligned"
        result[wanted] = self._global(address[:, None] + np.arange(size)).view(dtype)[:, 0]
        return result

    def load_int64(self, address):
        return int(self._load(address, True, np.int64))

    def load_float(self, address, wanted):
        return self._load(address, wanted, np.float32)

    def load_word(self, address, wanted):
        return self._load(address, wanted, np.int32).astype(np.int64)[()]

    def load_half(self, address, wanted):
        return self._load(address, wanted, np.uint16).astype(np.int64)

    def load_byte(self, address, wanted):
        return self._load(address, wanted, np.uint8).astype(np.int64)

    def _store(self, address, data, wanted):
        size = data.shape[1]
        wanted, address = self._wanted(wanted, address)
        assert (address % size == 0).all(), "an address is not aligned"
        at = (address[:, None] - HEAP + np.arange(size)).ravel()
        inside = ((at >= 0) & (at < len(self.heap))).all()
        assert inside, "no array lies there"
        assert self.writable[at].all(), "not to be written, or again"
        assert len(np.unique(at)) == len(at), "two threads write one place"
        self.heap[at], self.writable[at] = data[wanted].ravel(), self.shared_by_blocks[at]
        self.readable[at] |= self.shared_by_blocks[at]
        between = at[self.shared_by_blocks[at]]
        self.published[between], self.writer[between] = WRITTEN, self.number

    def store_float(self, address, x, wanted):
        self._store(address, self._lanes(x, np.float32).copy()[:, None].view(np.uint8), wanted)

    def store_half(self, address, x, wanted):
        self._store(address, (self._lanes(x) & 0xFFFF).astype(np.uint16)[:, None].view(np.uint8), wanted)

    def copy_out(self, address, shared, wanted):
        self._conflict("copy out", self._lanes(shared), 16)
        self._store(address, self._read_shared(self._lanes(shared), 16, self.ids), wanted)

    def store_word(self, address, x, wanted):
        self._store(address, self._lanes(x).astype(np.int32)[:, None].view(np.uint8), wanted)

    def add_global(self, address, x, wanted):
        assert np.sum(wanted) == 1, "of several threads nobody knows who is first"
        own = self.writer == self.number
        assert (self.published[own] == MET).all(), "a block counts itself in before others see what it wrote"
        self.counted, self.acquired = True, False
        at = int(self._lanes(address)[np.argmax(wanted)]) - HEAP
        self.writer[at : at + 4] = -1
        found = self._load(self._lanes(address), wanted, np.int32)
        self._store(address, (found + self._lanes(x)).astype(np.int32)[:, None].view(np.uint8), wanted)
        self.writer[at : at + 4] = -1
        return found.astype(np.int64)

    def fence(self):
        self.published[self.published == WRITTEN] = FENCED
        self.acquired = self.counted
