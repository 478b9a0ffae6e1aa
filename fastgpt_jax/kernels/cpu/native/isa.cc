#include "isa.h"

#include <cstdlib>
#include <string>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace fastgpt {
namespace {

struct Named {
  Isa isa;
  const char* name;
};

constexpr Named kNames[] = {
    {Isa::kPortable, "portable"},           {Isa::kNeonDot, "neon_dot"},           {Isa::kAvx2, "avx2"},
    {Isa::kAvx512Vnni, "avx512_vnni"}, {Isa::kAvx512Bf16, "avx512_bf16"},
};

Isa Best() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (avx2 && vnni && __builtin_cpu_supports("avx512bf16")) return Isa::kAvx512Bf16;
  if (avx2 && vnni) return Isa::kAvx512Vnni;
  if (avx2) return Isa::kAvx2;
#elif defined(__aarch64__)
  constexpr unsigned long kHasDotProduct = 1ul << 20;
  if (getauxval(AT_HWCAP) & kHasDotProduct) return Isa::kNeonDot;
#endif
  return Isa::kPortable;
}

bool IsHere(Isa isa, Isa best) {
  if (isa == Isa::kPortable || isa == best) return true;
  return isa >= Isa::kAvx2 && isa <= best;
}

struct Choice {
  Isa isa;
  std::string problem;
};

Choice Choose() {
  const Isa best = Best();
  const char* asked = std::getenv("FASTGPT_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return {best, ""};
  for (const Named& named : kNames) {
    if (std::string(named.name) != asked) continue;
    if (IsHere(named.isa, best)) return {named.isa, ""};
  }
  std::string here;
  for (const Named& named : kNames) {
    if (IsHere(named.isa, best)) here += (here.empty() ? "" : ", ") + std::string(named.name);
  }
  return {best, "FASTGPT_CPU_ISA must be one of " + here + " on this processor, got " + asked};
}

const Choice& Chosen() {
  static const Choice choice = Choose();
  return choice;
}

}  // namespace

Isa CurrentIsa() { return Chosen().isa; }

const char* NameOf(Isa isa) {
  for (const Named& named : kNames) {
    if (named.isa == isa) return named.name;
  }
  return "unknown";
}

const char* IsaProblem() { return Chosen().problem.empty() ? nullptr : Chosen().problem.c_str(); }

}  // namespace fastgpt
