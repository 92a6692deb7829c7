/* The inner loops of an average, compiled: the same bits as `numpy_kernel` gives, in one pass.

   Knows buffers of numbers only.  `compiled_kernel` calls it, and checks nothing again: whatever
   could read or write outside a buffer is refused here.  Python's limited API of 3.11, so that one
   build serves all later versions. */

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

static float load_float32(const unsigned char *at)
{
    float value;
    memcpy(&value, at, sizeof value); /* stored numbers may lie at any address */
    return value;
}

/* total = c x: the first term is stored, because adding it to 0 would lose the sign of -0. */
static void start_float32(const unsigned char *RESTRICT raw, Py_ssize_t count, double coefficient,
                          double *RESTRICT total)
{
    for (Py_ssize_t k = 0; k < count; k++)
        total[k] = coefficient * (double)load_float32(raw + 4 * k);
}

/* total += c x, with two roundings: the build switches off fused multiply-add, which has one. */
static void add_float32(const unsigned char *RESTRICT raw, Py_ssize_t count, double coefficient,
                        double *RESTRICT total)
{
    for (Py_ssize_t k = 0; k < count; k++)
        total[k] += coefficient * (double)load_float32(raw + 4 * k);
}

/* The cast rounds to nearest, ties to even: nobody changes the rounding mode of a Python process. */
static void round_float32(const double *RESTRICT values, Py_ssize_t count,
                          unsigned char *RESTRICT out)
{
    for (Py_ssize_t k = 0; k < count; k++) {
        float value = (float)values[k];
        memcpy(out + 4 * k, &value, sizeof value);
    }
}

/* Return 0 if a buffer of stored numbers and one of float64 fit each other; else set an error. */
static int check_buffers(const Py_buffer *stored, Py_ssize_t width, const Py_buffer *wide)
{
    if (stored->len % width || wide->len / 8 != stored->len / width || wide->len % 8) {
        PyErr_Format(PyExc_ValueError, "%zd bytes of %zd each do not match %zd bytes of float64",
                     stored->len, width, wide->len);
        return -1;
    }
    if ((uintptr_t)wide->buf % 8) {
        PyErr_SetString(PyExc_ValueError, "a buffer of float64 begins at no multiple of 8 bytes");
        return -1;
    }
    return 0;
}

static PyObject *accumulate(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer raw, total;
    double coefficient;
    int started;
    if (!PyArg_ParseTuple(arguments, "y*dw*p", &raw, &coefficient, &total, &started))
        return NULL;
    int wrong = check_buffers(&raw, 4, &total);
    if (!wrong) {
        Py_ssize_t count = raw.len / 4;
        Py_BEGIN_ALLOW_THREADS
        (started ? add_float32 : start_float32)(raw.buf, count, coefficient, total.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&total);
    if (wrong)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *round_to(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer values, out;
    if (!PyArg_ParseTuple(arguments, "y*w*", &values, &out))
        return NULL;
    int wrong = check_buffers(&out, 4, &values);
    if (!wrong) {
        Py_BEGIN_ALLOW_THREADS
        round_float32(values.buf, out.len / 4, out.buf);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&values);
    PyBuffer_Release(&out);
    if (wrong)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"accumulate", accumulate, METH_VARARGS,
     PyDoc_STR("accumulate(raw, coefficient, total, started)\n--\n\n"
               "Add the coefficient times stored float32 to a float64 total, or store it there.")},
    {"round_to", round_to, METH_VARARGS,
     PyDoc_STR("round_to(values, out)\n--\n\nRound float64 to float32 once, ties to even.")},
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
