# SPDX-FileCopyrightText: The gpu_fleet.nim authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A little CUDA through the driver's own library: needs no toolkit and no PyTorch."""

from __future__ import annotations

import array
import ctypes
import sys
import typing as t

_KERNEL = b"""
.version 6.3
.target sm_70
.address_size 64
.visible .entry axpy(.param .u64 p_x, .param .u64 p_y, .param .f32 p_a, .param .u32 p_n)
{
    .reg .pred %p<2>; .reg .f32 %f<5>; .reg .b32 %r<6>; .reg .b64 %d<6>;
    ld.param.u64 %d0, [p_x]; ld.param.u64 %d1, [p_y]; ld.param.f32 %f0, [p_a]; ld.param.u32 %r4, [p_n];
    mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;
    setp.ge.u32 %p0, %r3, %r4; @%p0 bra $done;
    mul.wide.u32 %d2, %r3, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
    ld.global.f32 %f1, [%d3]; ld.global.f32 %f2, [%d4]; fma.rn.f32 %f3, %f1, %f0, %f2; st.global.f32 [%d4], %f3;
$done:
    ret;
}
"""


class CudaError(Exception):
    """The driver is not there or refuses."""


class Cuda:
    """A context on one device."""

    def __init__(self, device: int = 0) -> None:
        try:
            self.library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(str(error)) from error
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        self.count = count.value
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), device)
        self.context = ctypes.c_void_p()
        self.call("cuCtxCreate_v2", ctypes.byref(self.context), 0, self.device)

    def call(self, name: str, *arguments: t.Any) -> None:
        code = getattr(self.library, name)(*arguments)
        if code:
            raise CudaError("%s: error %d" % (name, code))

    def use(self) -> None:
        """For whoever has several: what this thread calls next is meant for this device."""
        self.call("cuCtxSetCurrent", self.context)

    def uuid(self) -> str:
        raw = (ctypes.c_ubyte * 16)()
        self.call("cuDeviceGetUuid", ctypes.byref(raw), self.device)
        text = bytes(raw).hex()
        return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    def allocate(self, size: int) -> ctypes.c_ulonglong:
        pointer = ctypes.c_ulonglong()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        self.call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        return pointer

    def axpy(self, number: int = 1 << 20) -> float:
        """Largest error of y = 2 x + y on the GPU, for x = 0, 1, 2, … and y = 1."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), _KERNEL)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, b"axpy")
        x = array.array("f", (float(position % 1000) for position in range(number)))
        y = array.array("f", [1.0]) * number
        pointers = []
        for values in (x, y):
            pointer = self.allocate(number * 4)
            self.call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(values.buffer_info()[0]), ctypes.c_size_t(number * 4))
            pointers.append(pointer)
        arguments = [*pointers, ctypes.c_float(2.0), ctypes.c_uint(number)]
        addresses = (ctypes.c_void_p * 4)(*(ctypes.cast(ctypes.byref(one), ctypes.c_void_p) for one in arguments))
        self.call("cuLaunchKernel", function, (number + 255) // 256, 1, 1, 256, 1, 1, 0, None, addresses, None)
        self.call("cuCtxSynchronize")
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(y.buffer_info()[0]), pointers[1], ctypes.c_size_t(number * 4))
        return max(abs(found - (2.0 * (position % 1000) + 1.0)) for position, found in enumerate(y))


def main() -> None:
    """Hold a GPU: ``cuda.py DEVICE MEBIBYTES``; says the UUID, then waits for the end of standard input."""
    cuda = Cuda(int(sys.argv[1]))
    cuda.allocate(int(sys.argv[2]) << 20)
    error = cuda.axpy()
    sys.stdout.write("%s %g\n" % (cuda.uuid(), error))
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
