// main() where Catch2 is version 2, a header alone.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
