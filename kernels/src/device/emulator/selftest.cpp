// The emulator against planted mistakes, each of which it must find, then a whole kernel against double precision.
// Build it in each of the three modes of emulator.h; the last line is `all checks passed`, and the exit status says the same.
#include "selftest_check.h"
#include "selftest_counters.h"
#include "selftest_mistakes.h"
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
