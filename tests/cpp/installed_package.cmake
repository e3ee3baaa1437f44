# Installs the build into a scratch prefix, builds tests/cpp/consumer against it, and runs the result.
#   cmake -DBUILD=<build dir> -DSOURCE=<this dir> -DGENERATOR=<name> -DCXX=<compiler> -P installed_package.cmake
set(scratch "${BUILD}/installed_package")
file(REMOVE_RECURSE "${scratch}")
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${scratch}/prefix")
run("${CMAKE_COMMAND}" -S "${SOURCE}/consumer" -B "${scratch}/build" -G "${GENERATOR}"
    "-DCMAKE_PREFIX_PATH=${scratch}/prefix" "-DCMAKE_CXX_COMPILER=${CXX}" "-DCMAKE_MAKE_PROGRAM=${MAKE}")
run("${CMAKE_COMMAND}" --build "${scratch}/build")
run("${scratch}/build/consumer")
