/* random.h: base/random.h

   test_random_known  the published answers of Philox4x32-10 */
#ifndef MOE_TESTS_BASE_RANDOM_H
#define MOE_TESTS_BASE_RANDOM_H

#include "tests/test.h"

#include "moe/base/random.h"

typedef struct random_args {
    uint32_t* words; /* [3][4] */
} random_args;

/* Counter and key of a known answer. */
MOE_HOST_DEVICE moe_random4 random_known(int i)
{
    const uint32_t ones = 0xffffffffu;
    if (i == 0) return moe_random_words(0, 0, 0, 0, 0);
    if (i == 1) return moe_random_words(~(uint64_t)0, ones, ones, ones, ones);
    return moe_random_words(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu,
                            0x03707344u);
}

MOE_KERNEL(32, 1) random_kernel(MOE_ARG(random_args) d)
{
    for (int i = (int)threadIdx.x; i < 3; i += 32) {
        const moe_random4 r = random_known(i);
        d.words[i * 4] = r.x, d.words[i * 4 + 1] = r.y;
        d.words[i * 4 + 2] = r.z, d.words[i * 4 + 3] = r.w;
    }
}

/* The answers that the authors of Philox4x32-10 publish, on the host and on the device. */
static void test_random_known(void)
{
    static const uint32_t want[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u,
                                    0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu,
                                    0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u};
    moe_launch_config c = moe_grid(1, 32, 0, test_now.stream);
    tbuf words = tbuf_new("words", sizeof want, 0);
    random_args a;
    for (int i = 0; i < 3; ++i) {
        const moe_random4 r = random_known(i);
        CHECK(r.x == want[i * 4] && r.y == want[i * 4 + 1] && r.z == want[i * 4 + 2] &&
                  r.w == want[i * 4 + 3],
              "answer %d: %08x %08x %08x %08x", i, r.x, r.y, r.z, r.w);
    }
    a.words = (uint32_t*)words.p;
    CHECK_STATUS(MOE_LAUNCH(random_kernel, c, a), MOE_OK);
    CHECK(tbuf_holds(&words, want), "on the device");
    tbuf_free(&words);
}

static void base_random(void)
{
    RUN(test_random_known);
}

#endif
