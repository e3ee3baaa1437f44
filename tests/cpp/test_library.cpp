// A C++ caller of libtq4: every launcher links, without torch and without a GPU at hand.
#include "tq4.h"

#include <stdexcept>

#include "check.h"

int main() {
  const void* const launchers[] = {
      reinterpret_cast<const void*>(&tq4::launch_prefill),
      reinterpret_cast<const void*>(&tq4::launch_decode),
  };
  for (const void* launcher : launchers) CHECK(launcher != nullptr);
  return tq4::test::report("test_library");
}
