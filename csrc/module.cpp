// mamba_ops._C: what Python asks about the build. No tensors here: the operators go through torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &mamba_ops::build_info, "Version, compiler, CUDA version and targets of this build.");
  m.def("cpu_isa", &mamba_ops::cpu_isa, "The instruction set that the CPU kernels use now.");
  m.def("cpu_isas", &mamba_ops::runnable_cpu_isas, "Those that this machine can run, narrowest first.");
  m.def("set_cpu_isa", &mamba_ops::force_cpu_isa, pybind11::arg("name"), "Forces an instruction set.");
  m.def("set_cuda_path", &mamba_ops::force_cuda_path, pybind11::arg("name"),
        "\"auto\": the fastest CUDA kernels that can run a call; \"portable\": those for any GPU; "
        "\"small\": those, as they run on a GPU with 99 KB of shared memory a block.");
  m.def("plan", &mamba_ops::plan, pybind11::arg("op"), pybind11::arg("device"), pybind11::arg("dtype"),
        pybind11::arg("sizes"), "What a call would run, from its sizes by their letters.");
  m.def("norm_linear_limits", &mamba_ops::norm_linear_limits,
        "Rows and columns of the largest x of norm_linear that takes its kernel.");
  m.def(
      "mamba2_step_fits", &mamba_ops::mamba2_step_fits, pybind11::arg("layers"), pybind11::arg("d"),
      pybind11::arg("h"), pybind11::arg("n"), pybind11::arg("state_bytes"),
      "Whether mamba2_step has a kernel for these sizes and bytes of a state's value on the current device.");
}
