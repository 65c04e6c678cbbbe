# find_package(mamba_ops): target mamba_ops::mamba_ops, the library that registers torch.ops.mamba_ops when loaded.
# Link it with torch's own libraries, which it finds by their sonames.
if(NOT TARGET mamba_ops::mamba_ops)
  get_filename_component(_mamba_ops_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
  add_library(mamba_ops::mamba_ops SHARED IMPORTED)
  set_target_properties(mamba_ops::mamba_ops PROPERTIES
    IMPORTED_LOCATION "${_mamba_ops_root}/lib/libmamba_ops.so"
    IMPORTED_NO_SONAME ON
    INTERFACE_INCLUDE_DIRECTORIES "${_mamba_ops_root}/include"
    # The registrations run when the library is loaded: keep it although no symbol of it is used.
    INTERFACE_LINK_OPTIONS "LINKER:--push-state,--no-as-needed,${_mamba_ops_root}/lib/libmamba_ops.so,--pop-state;LINKER:--allow-shlib-undefined")
endif()
