/* The inner loops of an average, compiled: the same bits as `numpy_kernel` gives, in one pass.

   Knows buffers of numbers only.  Callers check nothing: whatever could read or write outside a
   buffer is refused here.  Python's limited API of 3.11, so that one build serves all later
   versions. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <float.h>
#include <stdint.h>
#include <string.h>

/* Where arithmetic could differ from numpy's in a bit, there is no compiled kernel: the build fails,
   and numpy is used. */
#ifdef __FAST_MATH__
#error "fast-math reorders sums and drops NaN"
#endif
#if FLT_EVAL_METHOD != 0
#error "products would be kept in more bits than float64 has"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "stored numbers are little-endian, and are read as they are"
#endif

/* Buffers do not overlap, which a compiler must know to use vectors. */
#define RESTRICT __restrict__

/* Loops are compiled three times, and the processor chooses when the module is loaded: AVX2 doubles
   the speed of rounding to 16 bits, and AVX-512 multiplies it by 10.  Where a compiler or a C
   library cannot do so, there is one version, for the vectors of every processor of its kind. */
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__)
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VERSIONS
#endif

typedef unsigned char byte;
typedef Py_ssize_t size;

/* Elements that are widened at a time for several sums: 4 KiB of float64, which stay in L1. */
#define BLOCK 512

/* --- Stored numbers to float64, exactly -------------------------------------------------------- */

/* Stored numbers may lie at any address, which `memcpy` allows. */
static inline uint16_t load16(const byte *at) { uint16_t x; memcpy(&x, at, 2); return x; }
static inline uint32_t load32(const byte *at) { uint32_t x; memcpy(&x, at, 4); return x; }
static inline uint64_t load64(const byte *at) { uint64_t x; memcpy(&x, at, 8); return x; }
static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline double as_double(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint32_t float_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline uint64_t double_bits(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }

/* A number is its fraction, with the hidden bit, times a power of two.  Subnormals have the exponent
   of the smallest normal numbers: with that one, they come out without a hidden bit. */
static inline uint32_t widen_bits(int32_t magnitude, int fraction, int bias)
{
    int32_t hidden = 1 << fraction, field = magnitude & -hidden;
    field = field > hidden ? field : hidden;
    uint32_t unit = (uint32_t)(field << (23 - fraction)) + ((uint32_t)(127 - bias - fraction) << 23);
    return float_bits((float)(magnitude - field + hidden) * as_float(unit));
}

static inline double widen_float16(uint16_t stored)
{
    int32_t magnitude = stored & 0x7FFF;
    uint32_t bits = widen_bits(magnitude, 10, 15);
    bits |= magnitude >= 0x7C00 ? 0x7F800000 : 0; /* infinity and NaN */
    return as_float(bits | (uint32_t)(stored & 0x8000) << 16);
}

static inline double widen_bfloat16(uint16_t stored) { return as_float((uint32_t)stored << 16); }

static inline double widen_float8_e4m3fn(uint8_t stored)
{
    int32_t magnitude = stored & 0x7F;
    uint32_t bits = widen_bits(magnitude, 3, 7);
    bits = magnitude == 0x7F ? 0x7FC00000 : bits; /* the only NaN */
    return as_float(bits | (uint32_t)(stored & 0x80) << 24);
}

static inline double widen_float8_e5m2(uint8_t stored)
{
    int32_t magnitude = stored & 0x7F;
    uint32_t bits = widen_bits(magnitude, 2, 15);
    bits = magnitude > 0x7C ? 0x7FC00000 : bits;
    bits = magnitude == 0x7C ? 0x7F800000 : bits;
    return as_float(bits | (uint32_t)(stored & 0x80) << 24);
}

/* Make a signalling NaN quiet, as arithmetic does. */
static inline double quiet(double x)
{
    uint64_t bits = double_bits(x);
    return as_double(bits | ((int64_t)(bits << 1 >> 1) > 0x7FFll << 52 ? 1ull << 51 : 0));
}

/* For each element x, as `how` says: out = x; out = c x; or out += c x.  The first term is stored and
   not added to 0, which would lose the sign of -0.  A sum has two roundings: the build switches off
   fused multiply-add, which has one. */
enum use { WIDEN, START, ADD };

typedef void Reader(const byte *RESTRICT raw, size count, enum use how, double c,
                    double *RESTRICT out);

#define EACH(WIDTH, RESULT)                                                                        \
    for (size k = 0; k < count; k++) {                                                             \
        const byte *at = raw + k * WIDTH;                                                          \
        out[k] = RESULT;                                                                           \
    }
#define READER(NAME, WIDTH, X)                                                                     \
    VERSIONS static void NAME(const byte *RESTRICT raw, size count, enum use how, double c,        \
                              double *RESTRICT out)                                                \
    {                                                                                              \
        if (how == ADD)                                                                            \
            EACH(WIDTH, out[k] + c * (X))                                                          \
        else if (how == START)                                                                     \
            EACH(WIDTH, c * (X))                                                                   \
        else                                                                                       \
            EACH(WIDTH, quiet(X))                                                                  \
    }

READER(read_float8_e4m3fn, 1, widen_float8_e4m3fn(*at))
READER(read_float8_e5m2, 1, widen_float8_e5m2(*at))
READER(read_float16, 2, widen_float16(load16(at)))
READER(read_float16_swapped, 2, widen_float16(__builtin_bswap16(load16(at))))
READER(read_bfloat16, 2, widen_bfloat16(load16(at)))
READER(read_bfloat16_swapped, 2, widen_bfloat16(__builtin_bswap16(load16(at))))
READER(read_float32, 4, (double)as_float(load32(at)))
READER(read_float32_swapped, 4, (double)as_float(__builtin_bswap32(load32(at))))
READER(read_float64, 8, as_double(load64(at)))
READER(read_float64_swapped, 8, as_double(__builtin_bswap64(load64(at))))

/* --- float64 to stored numbers, rounded once --------------------------------------------------- */

/* Return the bits of x in a type with fewer.

   Adding 2^52 of the type's units at x rounds x to whole units, to nearest, ties to even, once: of
   the sum, the fraction counts the units.  Codes count units too, from one exponent to the next.
   `lowest` is the exponent of the subnormals, and `beyond` stands for all that overflows. */
static inline int64_t round_bits(int64_t magnitude, int fraction, int lowest, double beyond)
{
    int64_t most = (int64_t)double_bits(beyond), unit = 1023 + lowest + 52 - fraction;
    magnitude = magnitude < most ? magnitude : most; /* NaN too */
    int64_t whole = (magnitude & 0x7FFll << 52) + ((int64_t)(52 - fraction) << 52);
    whole = whole > unit << 52 ? whole : unit << 52;
    double sum = as_double((uint64_t)magnitude) + as_double((uint64_t)whole);
    return (int64_t)double_bits(sum) - whole + (whole >> (52 - fraction)) - (unit << fraction);
}

/* The upper bits of a NaN's fraction, with the one that makes it quiet; 0 of a number. */
static inline int64_t keep_nan(int64_t magnitude, int fraction)
{
    int64_t kept = (magnitude & 0xFFFFFFFFFFFFFll) | 1ll << 51;
    return magnitude > 0x7FFll << 52 ? kept >> (52 - fraction) : 0;
}

#define NARROW(NAME, TYPE, FRACTION, LOWEST, BEYOND, NAN_BITS)                                     \
    static inline TYPE NAME(double x)                                                              \
    {                                                                                              \
        int64_t bits = (int64_t)double_bits(x), magnitude = bits & INT64_MAX;                      \
        int64_t sign = (int64_t)((uint64_t)bits >> 63 << (8 * sizeof(TYPE) - 1));                  \
        return (TYPE)(round_bits(magnitude, FRACTION, LOWEST, BEYOND) | (NAN_BITS) | sign);        \
    }

NARROW(round_float16, uint16_t, 10, -14, 0x1p16, keep_nan(magnitude, 10))
NARROW(round_bfloat16, uint16_t, 7, -126, 0x1p128, keep_nan(magnitude, 7))
/* Without infinity, what overflows is NaN, whose code is where 480 would be. */
NARROW(round_float8_e4m3fn, uint8_t, 3, -6, 480.0, 0)
NARROW(round_float8_e5m2, uint8_t, 2, -14, 0x1p16, keep_nan(magnitude, 2) & 2)

typedef void Writer(const double *RESTRICT values, size count, byte *RESTRICT out);

#define WRITER(NAME, TYPE, STORED)                                                                 \
    VERSIONS static void NAME(const double *RESTRICT values, size count, byte *RESTRICT out)       \
    {                                                                                              \
        for (size k = 0; k < count; k++) {                                                         \
            double x = values[k];                                                                  \
            TYPE stored = STORED;                                                                  \
            memcpy(out + k * (size)sizeof stored, &stored, sizeof stored);                         \
        }                                                                                          \
    }

WRITER(write_float8_e4m3fn, uint8_t, round_float8_e4m3fn(x))
WRITER(write_float8_e5m2, uint8_t, round_float8_e5m2(x))
WRITER(write_float16, uint16_t, round_float16(x))
WRITER(write_float16_swapped, uint16_t, __builtin_bswap16(round_float16(x)))
WRITER(write_bfloat16, uint16_t, round_bfloat16(x))
WRITER(write_bfloat16_swapped, uint16_t, __builtin_bswap16(round_bfloat16(x)))
/* A cast rounds to nearest, ties to even: nobody changes the rounding mode of a Python process. */
WRITER(write_float32, uint32_t, float_bits((float)x))
WRITER(write_float32_swapped, uint32_t, __builtin_bswap32(float_bits((float)x)))
WRITER(write_float64, uint64_t, double_bits(x))
WRITER(write_float64_swapped, uint64_t, __builtin_bswap64(double_bits(x)))

/* --- Sums -------------------------------------------------------------------------------------- */

/* The exponent of infinity and NaN, and of nothing else, carries into the sign when 1 is added. */
static inline uint64_t mark_nonfinite(double x)
{
    return (double_bits(x) & 0x7FFull << 52) + (1ull << 52);
}

/* Divide in place, and return whether all quotients are finite. */
VERSIONS static int divide_all(double *values, size count, double divisor)
{
    uint64_t marks = 0;
    for (size k = 0; k < count; k++) {
        if (divisor != 1) /* which the compiler asks outside the loop */
            values[k] /= divisor;
        marks |= mark_nonfinite(values[k]);
    }
    return !(marks >> 63);
}

/* A term of an average: what the values are multiplied by, and the sum that it is added to. */
struct term {
    double c;
    enum use how;
    Py_buffer total;
};

/* Add all terms of some values.  For several sums, each block of values is widened once. */
static void add_terms(Reader *read, size width, const byte *raw, size count,
                      const struct term *terms, size number)
{
    double values[BLOCK];
    if (number == 1)
        read(raw, count, terms->how, terms->c, terms->total.buf);
    else for (size start = 0; start < count; start += BLOCK) {
        size length = count - start < BLOCK ? count - start : BLOCK;
        read(raw + start * width, length, WIDEN, 0, values);
        for (size k = 0; k < number; k++)
            read_float64((const byte *)values, length, terms[k].how, terms[k].c,
                         (double *)terms[k].total.buf + start);
    }
}

/* --- What Python calls ------------------------------------------------------------------------- */

static const struct kind {
    const char *dtype, *byteorder;
    size width;
    Reader *read;
    Writer *write;
} KINDS[] = {
    {"float32", "<", 4, read_float32, write_float32},
    {"float32", ">", 4, read_float32_swapped, write_float32_swapped},
    {"float16", "<", 2, read_float16, write_float16},
    {"float16", ">", 2, read_float16_swapped, write_float16_swapped},
    {"bfloat16", "<", 2, read_bfloat16, write_bfloat16},
    {"bfloat16", ">", 2, read_bfloat16_swapped, write_bfloat16_swapped},
    {"float64", "<", 8, read_float64, write_float64},
    {"float64", ">", 8, read_float64_swapped, write_float64_swapped},
    {"float8_e4m3fn", "<", 1, read_float8_e4m3fn, write_float8_e4m3fn},
    {"float8_e4m3fn", ">", 1, read_float8_e4m3fn, write_float8_e4m3fn},
    {"float8_e5m2", "<", 1, read_float8_e5m2, write_float8_e5m2},
    {"float8_e5m2", ">", 1, read_float8_e5m2, write_float8_e5m2},
};

/* Return how a buffer is read and written that holds whole numbers of a type; else set an error. */
static const struct kind *find_kind(const char *dtype, const char *byteorder, size nbytes)
{
    const struct kind *kind = KINDS, *end = KINDS + sizeof KINDS / sizeof *KINDS;
    while (kind < end && (strcmp(kind->dtype, dtype) || strcmp(kind->byteorder, byteorder)))
        kind++;
    if (kind < end && nbytes % kind->width == 0)
        return kind;
    PyErr_Format(PyExc_ValueError, "%zd bytes are no '%s%s'", nbytes, byteorder, dtype);
    return NULL;
}

/* Return whether a buffer is float64 of some length, and aligned; else set an error. */
static int is_float64(const Py_buffer *buffer, size count)
{
    /* Divided, because 8 bytes for each float8 could be more than a length can say. */
    if (buffer->len / 8 == count && buffer->len % 8 == 0 && (uintptr_t)buffer->buf % 8 == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "expected %zd aligned float64, found %zd bytes at %p", count,
                 buffer->len, buffer->buf);
    return 0;
}

/* Fill in a term from its tuple (row, c); return 0 and set an error if it does not fit. */
static int take_term(struct term *term, PyObject *tuple, PyObject *sums, size count,
                     Py_buffer *started)
{
    size row;
    if (!PyArg_ParseTuple(tuple, "nd", &row, &term->c))
        return 0;
    if (row < 0 || row >= started->len) {
        PyErr_Format(PyExc_ValueError, "there is no sum %zd among %zd", row, started->len);
        return 0;
    }
    PyObject *total = PySequence_GetItem(sums, row);
    int wrong = !total || PyObject_GetBuffer(total, &term->total, PyBUF_WRITABLE);
    Py_XDECREF(total);
    if (wrong || !is_float64(&term->total, count))
        return 0;
    byte *flag = (byte *)started->buf + row;
    term->how = *flag ? ADD : START;
    *flag = 1;
    return 1;
}

static PyObject *accumulate(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer raw, started;
    const char *dtype, *byteorder;
    PyObject *pairs, *sums, *scratch; /* blocks on the stack serve instead of the last */
    if (!PyArg_ParseTuple(arguments, "y*ssOOw*O", &raw, &dtype, &byteorder, &pairs, &sums, &started,
                          &scratch))
        return NULL;
    const struct kind *kind = find_kind(dtype, byteorder, raw.len);
    size number = kind ? PySequence_Size(pairs) : -1, taken = 0;
    struct term *terms = number < 0 ? NULL : PyMem_Calloc((size_t)number + 1, sizeof *terms);
    int fits = terms != NULL;
    size count = fits ? raw.len / kind->width : 0;
    for (; fits && taken < number; taken++) {
        PyObject *pair = PySequence_GetItem(pairs, taken);
        fits = pair && take_term(terms + taken, pair, sums, count, &started);
        Py_XDECREF(pair);
    }
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        add_terms(kind->read, kind->width, raw.buf, count, terms, number);
        Py_END_ALLOW_THREADS
    }
    for (size k = 0; k < taken; k++)
        PyBuffer_Release(&terms[k].total); /* does nothing to one that was not taken */
    PyMem_Free(terms);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&started);
    return fits ? Py_NewRef(Py_None) : PyErr_Occurred() ? NULL : PyErr_NoMemory();
}

static PyObject *widen(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer raw, out;
    const char *dtype, *byteorder;
    if (!PyArg_ParseTuple(arguments, "y*ssw*", &raw, &dtype, &byteorder, &out))
        return NULL;
    const struct kind *kind = find_kind(dtype, byteorder, raw.len);
    int fits = kind && is_float64(&out, raw.len / kind->width);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        kind->read(raw.buf, out.len / 8, WIDEN, 0, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&out);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *round_to(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer values, out;
    const char *dtype, *byteorder;
    if (!PyArg_ParseTuple(arguments, "y*ssw*", &values, &dtype, &byteorder, &out))
        return NULL;
    const struct kind *kind = find_kind(dtype, byteorder, out.len);
    int fits = kind && is_float64(&values, out.len / kind->width);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        kind->write(values.buf, values.len / 8, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyObject *divide(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer values;
    double divisor;
    if (!PyArg_ParseTuple(arguments, "w*d", &values, &divisor))
        return NULL;
    size count = values.len / 8;
    int fits = is_float64(&values, count), finite = 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        finite = divide_all(values.buf, count, divisor);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    return fits ? PyBool_FromLong(finite) : NULL;
}

#define FUNCTION(NAME, ARGUMENTS, TEXT)                                                            \
    {#NAME, NAME, METH_VARARGS, PyDoc_STR(#NAME ARGUMENTS "\n--\n\n" TEXT)}

static PyMethodDef functions[] = {
    FUNCTION(accumulate, "(raw, dtype, byteorder, terms, sums, started, scratch)",
             "Add one checkpoint's terms to the sums of all averages it counts in."),
    FUNCTION(widen, "(raw, dtype, byteorder, out)", "Convert stored bytes to float64."),
    FUNCTION(divide, "(values, divisor)", "Divide in place; return whether all are finite."),
    FUNCTION(round_to, "(values, dtype, byteorder, out)", "Round float64 to a stored type once."),
    {NULL, NULL, 0, NULL},
};

/* Tests compare this digest of the source with the source, and so notice an extension of another. */
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST ""
#endif

static int add_constants(PyObject *module)
{
    return PyModule_AddStringConstant(module, "SOURCE_DIGEST", SOURCE_DIGEST);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_constants}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "polyak_cli.engine._kernel",
    .m_doc = PyDoc_STR("The compiled kernel; see `kernel`."),
    .m_size = 0, /* no state */
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void)
{
    return PyModuleDef_Init(&definition);
}
