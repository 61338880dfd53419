// One learned step as an XLA FFI handler: (x, target, learn, order) -> (y, loss, order).
//
// The state is the engine's, so the call has a side effect; `order`, a counter that passes through, makes every
// step depend on the one before.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "modprop_fast.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static const mpf_api *mpf;

// With the GIL: a handle on a modprop_fast.Learner, or 0 and a Python exception.
extern "C" int64_t adopt(PyObject *learner)
{
    mpf_learner *handle = nullptr;
    mpf = static_cast<const mpf_api *>(PyCapsule_Import(MPF_CAPSULE, 0));
    if (!mpf)
        return 0;
    if (!MPF_FITS(mpf))
        PyErr_SetString(PyExc_ImportError, "modprop_fast is older than the header of this library");
    else if (mpf->mpf_adopt(learner, &handle) != MPF_OK)
        PyErr_SetString(PyExc_RuntimeError, mpf->mpf_last_error());
    return reinterpret_cast<int64_t>(handle);
}

static ffi::Error step(int64_t handle, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> target, ffi::Buffer<ffi::S32> learn,
                       ffi::Buffer<ffi::S32> order, ffi::ResultBuffer<ffi::F32> y, ffi::ResultBuffer<ffi::F32> loss,
                       ffi::ResultBuffer<ffi::S32> next)
{
    auto *learner = reinterpret_cast<mpf_learner *>(handle);
    double value;
    if (mpf->mpf_step(learner, x.typed_data(), x.size_bytes(), target.typed_data(), target.size_bytes(),
                      *learn.typed_data(), y->typed_data(), y->size_bytes()) != MPF_OK ||
        mpf->mpf_loss(learner, &value) != MPF_OK)
        return ffi::Error::Internal(mpf->mpf_last_error());
    *loss->typed_data() = static_cast<float>(value);
    *next->typed_data() = *order.typed_data() + 1;
    return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(modprop_step, step,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("handle")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
