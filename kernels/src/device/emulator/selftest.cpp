// The emulator against planted mistakes, each of which it must find, then a whole kernel against double precision.
// The last line is `all checks passed`, and the exit status says the same. Run it in the three modes of emulator.h, with
// its K, D and libemu.so:
//   fast:          g++ $K D/emulator/selftest.cpp libemu.so -Wl,-rpath,'$ORIGIN' -o selftest
//   races:         g++ $K -fsanitize=thread --param tsan-distinguish-volatile=1 --param tsan-instrument-func-entry-exit=0
//                      D/emulator/selftest.cpp -nodefaultlibs libemu.so -lstdc++ -lm -lgcc_s -lgcc -lc -Wl,-rpath,'$ORIGIN' -o selftest
//   asan + ubsan:  the line of `fast` and its libemu.so, with the flags that emulator.h gives
#include "selftest_check.h"
#include "selftest_counters.h"
#include "selftest_mistakes.h"
#include "selftest_pipeline.h"
#include "selftest_races.h"
#include "selftest_sanitizer.h"
#include "selftest_shadow.h"
#include "selftest_shrink.h"
#include "selftest_values.h"

int main() {
    check_values();
    check_mistakes();
    check_shadows();
    check_counters();
    check_pipeline();
    if (EMU_INSTRUMENTED) check_races();
#ifdef __SANITIZE_ADDRESS__
    check_overruns();
#endif
    check_all_mixes<576>();
    check_all_mixes<2048>();
    if (failures == 0) std::printf("all checks passed\n");
    else std::printf("%d checks failed\n", failures);
    return failures == 0 ? 0 : 1;
}
