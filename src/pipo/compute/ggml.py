"""The only door to libggml: a small typed ctypes façade over whichever build of it is found.

Providers, in order: the folder named by PIPO_GGML, the libraries inside `llama-cpp-python` when that extra is
installed, those of `ggml-python`. Version, type sizes and the tensor layout are checked once at load; a library that
does not match is refused. Between ggml 0.15.3 and 0.25.3 `struct ggml_tensor` is the same and none of the functions
below changed (read from both sources).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipo.base.errors import LibraryError
from pipo.base.tensor_type import TensorType

log = logging.getLogger(__name__)

MAX_DIMS = 4
MIN_VERSION = (0, 15)
_NEWER_TYPES_SINCE = (0, 25)  # Q2_0; Q1_0 and all before are in 0.15.3
ENV_FOLDER = "PIPO_GGML"


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor`; the layout is verified by `_check_layout`."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * MAX_DIMS),
        ("nb", c_size_t * MAX_DIMS),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class ComputePlan(ctypes.Structure):
    """`struct ggml_cplan`, returned by value; `reserved` is for fields that newer versions append."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", POINTER(c_uint8)),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
        ("reserved", ctypes.c_char * 64),
    )


class TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block_elems", c_int64),
        ("block_elems_interleave", c_int64),
        ("type_bytes", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", c_void_p),
        ("from_float_ref", c_void_p),
    )


class DeviceProperties(ctypes.Structure):
    """`struct ggml_backend_dev_props`, filled by the library; `reserved` is for fields that newer versions append."""

    _fields_ = (
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        ("is_async", c_bool),
        ("has_host_buffer", c_bool),
        ("has_buffer_from_host_ptr", c_bool),
        ("has_events", c_bool),
        ("reserved", ctypes.c_char * 64),
    )


class Feature(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("value", c_char_p))


# ggml logs through `void log(int level, const char *text, void *user)`, from the transfer workers too; `abs` takes the
# level, does nothing with it and, unlike a Python callback, needs no GIL
_NO_LOG = ctypes.cast((ctypes.CDLL("msvcrt") if sys.platform == "win32" else ctypes.CDLL(None)).abs, c_void_p)
ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
_T = c_void_p  # struct ggml_tensor *

# name: (result, *arguments), from ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_version": (c_char_p,),
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_used_mem": (c_size_t, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_type_size": (c_size_t, c_int),
    "ggml_blck_size": (c_int64, c_int),
    "ggml_get_type_traits": (POINTER(TypeTraits), c_int),
    "ggml_quantize_chunk": (c_size_t, c_int, _T, _T, c_int64, c_int64, c_int64, c_void_p),
    "ggml_nbytes": (c_size_t, _T),
    "ggml_op_desc": (c_char_p, _T),
    "ggml_new_tensor": (_T, c_void_p, c_int, c_int, POINTER(c_int64)),
    "ggml_set_name": (_T, _T, c_char_p),
    "ggml_get_first_tensor": (_T, c_void_p),
    "ggml_get_next_tensor": (_T, c_void_p, _T),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, _T),
    "ggml_graph_n_nodes": (c_int, c_void_p),
    "ggml_graph_node": (_T, c_void_p, c_int),
    "ggml_add": (_T, c_void_p, _T, _T),
    "ggml_add_inplace": (_T, c_void_p, _T, _T),
    "ggml_mul": (_T, c_void_p, _T, _T),
    "ggml_rms_norm": (_T, c_void_p, _T, c_float),
    "ggml_norm": (_T, c_void_p, _T, c_float),
    "ggml_mul_mat": (_T, c_void_p, _T, _T),
    "ggml_scale_bias": (_T, c_void_p, _T, c_float, c_float),
    "ggml_sigmoid": (_T, c_void_p, _T),
    "ggml_tanh": (_T, c_void_p, _T),
    "ggml_relu": (_T, c_void_p, _T),
    "ggml_swiglu": (_T, c_void_p, _T),
    "ggml_swiglu_split": (_T, c_void_p, _T, _T),
    "ggml_swiglu_oai": (_T, c_void_p, _T, _T, c_float, c_float),
    "ggml_reshape_2d": (_T, c_void_p, _T, c_int64, c_int64),
    "ggml_reshape_3d": (_T, c_void_p, _T, c_int64, c_int64, c_int64),
    "ggml_reshape_4d": (_T, c_void_p, _T, c_int64, c_int64, c_int64, c_int64),
    "ggml_permute": (_T, c_void_p, _T, c_int, c_int, c_int, c_int),
    "ggml_acc_inplace": (_T, c_void_p, _T, _T, c_size_t, c_size_t, c_size_t, c_size_t),
    "ggml_view_1d": (_T, c_void_p, _T, c_int64, c_size_t),
    "ggml_view_2d": (_T, c_void_p, _T, c_int64, c_int64, c_size_t, c_size_t),
    "ggml_view_3d": (_T, c_void_p, _T, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t),
    "ggml_view_4d": (_T, c_void_p, _T, c_int64, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t, c_size_t),
    "ggml_get_rows": (_T, c_void_p, _T, _T),
    "ggml_set_rows": (_T, c_void_p, _T, _T, _T),
    "ggml_rope_ext": (
        _T, c_void_p, _T, _T, _T, c_int, c_int, c_int, c_float, c_float, c_float, c_float, c_float, c_float,
    ),
    "ggml_flash_attn_ext": (_T, c_void_p, _T, _T, _T, _T, c_float, c_float, c_float),
    "ggml_flash_attn_ext_set_prec": (None, _T, c_int),
    "ggml_flash_attn_ext_add_sinks": (None, _T, _T),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_gallocr_reserve": (c_bool, c_void_p, c_void_p),
    "ggml_gallocr_reserve_n_size": (None, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_size_t)),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_gallocr_get_buffer_size": (c_size_t, c_void_p, c_int),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_buft_get_alignment": (c_size_t, c_void_p),
    "ggml_backend_buft_get_max_size": (c_size_t, c_void_p),
    "ggml_backend_buft_get_alloc_size": (c_size_t, c_void_p, _T),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buffer_get_base": (c_void_p, c_void_p),
    "ggml_backend_buffer_get_type": (c_void_p, c_void_p),
    "ggml_backend_buffer_clear": (None, c_void_p, c_uint8),
    "ggml_backend_buffer_init_tensor": (c_int, c_void_p, _T),
    "ggml_backend_tensor_set": (None, _T, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, _T, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_set_async": (None, c_void_p, _T, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get_async": (None, c_void_p, _T, c_void_p, c_size_t, c_size_t),
    "ggml_backend_dev_count": (c_size_t,),
    "ggml_backend_dev_get": (c_void_p, c_size_t),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
    "ggml_backend_dev_name": (c_char_p, c_void_p),
    "ggml_backend_dev_description": (c_char_p, c_void_p),
    "ggml_backend_dev_memory": (None, c_void_p, POINTER(c_size_t), POINTER(c_size_t)),
    "ggml_backend_dev_type": (c_int, c_void_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_get_props": (None, c_void_p, POINTER(DeviceProperties)),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_host_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, _T),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_graph_compute_async": (c_int, c_void_p, c_void_p),
    "ggml_backend_synchronize": (None, c_void_p),
    "ggml_backend_event_new": (c_void_p, c_void_p),
    "ggml_backend_event_free": (None, c_void_p),
    "ggml_backend_event_record": (None, c_void_p, c_void_p),
    "ggml_backend_event_synchronize": (None, c_void_p),
    "ggml_backend_event_wait": (None, c_void_p, c_void_p),
    "ggml_graph_plan": (ComputePlan, c_void_p, c_int, c_void_p),
}  # fmt: skip

# reached through the CPU registry's proc address, so that a dynamically loaded CPU backend serves too
_CPU_PROCS: dict[str, tuple[Any, ...]] = {
    "ggml_backend_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_set_abort_callback": (None, c_void_p, c_void_p, c_void_p),
    "ggml_backend_dev_get_extra_bufts": (POINTER(c_void_p), c_void_p),
    "ggml_backend_get_features": (POINTER(Feature), c_void_p),
}

DEVICE_TYPE_CPU = 0


@dataclass(frozen=True, slots=True)
class Provider:
    """Where a libggml was found: `name` is the package or variable, `folder` holds the shared libraries."""

    name: str
    folder: Path


class Library:
    """libggml, loaded and checked. Functions are attributes without the `ggml_` prefix: `lib.mul_mat(...)`.

    Threads: every function called here releases the GIL. A context, graph or backend belongs to one thread at a time.
    """

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self._handles = _load_shared(provider)
        for name, (result, *arguments) in _SIGNATURES.items():
            setattr(self, name.removeprefix("ggml_"), self._function(name, result, arguments))
        self.version_text: str = self.version().decode()
        self._check_version()
        self.log_set(_NO_LOG, None)
        self._check_types()
        self.cpu_device: int = self.backend_dev_by_type(DEVICE_TYPE_CPU)
        if not self.cpu_device:
            raise LibraryError(f"libggml of {provider.name} has no CPU backend ({provider.folder})")
        self.cpu_registry: int = self.backend_dev_backend_reg(self.cpu_device)
        for name, (result, *arguments) in _CPU_PROCS.items():
            setattr(self, name.removeprefix("ggml_"), self._cpu_proc(name, result, arguments))
        _check_layout(self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"libggml function ggml_{name} has no signature in pipo.compute.ggml")

    def _function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        for handle in self._handles:
            function = getattr(handle, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                return function
        raise LibraryError(
            f"libggml of {self.provider.name} lacks {name} ({self.provider.folder})",
            hint="reinstall ggml-python, or unset PIPO_GGML",
        )

    def _cpu_proc(self, name: str, result: Any, arguments: list[Any]) -> Any:
        address = self.backend_reg_get_proc_address(self.cpu_registry, name.encode())
        if not address:
            raise LibraryError(f"the CPU backend of libggml ({self.provider.name}) lacks {name}")
        return ctypes.CFUNCTYPE(result, *arguments)(address)

    def _check_version(self) -> None:
        numbers = (int(n) for n in self.version_text.split("-")[0].split(".")[:2] if n.isdigit())
        self._version = tuple(numbers)
        if self._version < MIN_VERSION:
            raise LibraryError(
                f"libggml {self.version_text} of {self.provider.name} is too old: 0.15 or newer is needed",
                hint="pip install -U ggml-python, or unset PIPO_GGML",
            )

    def computes(self, type_: TensorType) -> bool:
        """True when this version knows the type at all; asking C about a newer one would read past its table."""
        return type_ <= TensorType.Q1_0 or self._version >= _NEWER_TYPES_SINCE

    def multiplies(self, type_: TensorType) -> bool:
        """True when there is a product with matrices of this type; integers and types of intermediates have none."""
        if type_ is TensorType.F32:
            return True
        return self.computes(type_) and bool(self.get_type_traits(int(type_)).contents.to_float)

    def _check_types(self) -> None:
        for t in filter(self.computes, TensorType):
            known = self.blck_size(t), self.type_size(t)
            if known != (t.block_elems, t.block_bytes):
                raise LibraryError(f"libggml {self.version_text} sizes {t.name} as {known}, not as pipo does")


# How often a thread of GNU OpenMP looks for work before it sleeps; libgomp reads it once, when libggml brings it in.
# With its own 300 000 (milliseconds) every barrier waits for a time slice when anything else wants a core: beside one
# more such process a 1.1B model took 800 ms a token, and takes 60 at 500. Alone a short spin costs what waking a thread
# does, before each graph and after each short op: a mixture of small experts computes 175 ms of a pass at 500, 158 at
# 3000, and beside a busy process 306 and 386. See docs/log.md.
_SPIN_COUNT = "1500"


def _calm_openmp() -> None:
    """Unless the user has said how OpenMP should wait."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


def _load_shared(provider: Provider) -> list[ctypes.CDLL]:
    _calm_openmp()
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would start a debugger
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    handles = []
    for stem in ("ggml-base", "ggml-cpu", "ggml"):
        path = provider.folder / f"{prefix}{stem}{suffix}"
        if stem == "ggml-cpu" and not path.exists():
            continue  # built with GGML_BACKEND_DL: the CPU backend comes through ggml_backend_load_all
        try:
            handles.append(ctypes.CDLL(str(path), mode=getattr(os, "RTLD_LOCAL", 0)))
        except OSError as error:
            raise LibraryError(
                f"cannot load {path} (from {provider.name}): {error}", hint="reinstall ggml-python, or unset PIPO_GGML"
            ) from error
    if len(handles) == 2:
        load_all = handles[-1].ggml_backend_load_all_from_path
        load_all.restype, load_all.argtypes = None, [c_char_p]
        load_all(str(provider.folder).encode())
    return list(reversed(handles))


def find_providers() -> list[Provider]:
    """Every libggml that could be used, best first. Imports none of the packages."""
    named = os.environ.get(ENV_FOLDER)
    if named:
        if not Path(named).is_dir():
            raise LibraryError(
                f"{ENV_FOLDER}={named} is not a folder", hint="name the folder that holds libggml-base and libggml"
            )
        return [Provider(ENV_FOLDER, Path(named))]
    found = []
    for package, distribution in (("llama_cpp", "llama-cpp-python"), ("ggml", "ggml-python")):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and (Path(spec.origin).parent / "lib").is_dir():
            found.append(Provider(distribution, Path(spec.origin).parent / "lib"))
    return found


@functools.cache
def load() -> Library:
    """The library of the first provider. Raises LibraryError when none is found or it does not fit."""
    providers = find_providers()
    if not providers:
        raise LibraryError("no libggml found", hint="pip install ggml-python, or set PIPO_GGML to a folder")
    library = Library(providers[0])
    log.debug("libggml version=%s provider=%s folder=%s", library.version_text, providers[0].name, providers[0].folder)
    return library


def _check_layout(lib: Library) -> None:
    """Make one tensor in C and read every field we rely on back through `GgmlTensor`."""
    context = lib.init(InitParams(1 << 16, None, True))
    try:
        tensor = GgmlTensor.from_address(lib.new_tensor(context, int(TensorType.F16), 4, (c_int64 * 4)(32, 3, 5, 7)))
        lib.set_name(ctypes.addressof(tensor), b"layout")
        view = GgmlTensor.from_address(
            lib.view_3d(context, ctypes.addressof(tensor), 32, 3, 2, tensor.nb[1], tensor.nb[2], tensor.nb[2])
        )
        fits = (
            tuple(tensor.ne) == (32, 3, 5, 7)
            and tuple(tensor.nb) == (2, 64, 192, 960)
            and tensor.type == TensorType.F16
            and tensor.name == b"layout"
            and tensor.data is None
            and tensor.extra is None
            and view.view_src == ctypes.addressof(tensor)
            and view.view_offs == 192
            and lib.tensor_overhead() >= ctypes.sizeof(GgmlTensor)
        )
    finally:
        lib.free(context)
    if not fits:
        raise LibraryError(
            f"libggml {lib.version_text} ({lib.provider.folder}) lays ggml_tensor out in a way pipo does not know"
        )
