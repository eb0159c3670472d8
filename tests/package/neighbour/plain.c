/* plain.c: a C program that uses the .h parts. */
#include <moe/moe.h>

#include <stdio.h>

int main(void)
{
    char text[MOE_STATUS_TEXT];
    const moe_status s = MOE_STATUS(MOE_ERR_RANGE, top_k);
    printf("moe %s: %s; %d chunks\n", MOE_VERSION_STRING, moe_status_describe(s, text),
           (int)moe_num_chunks(100));
    return moe_version() != MOE_VERSION || strcmp(text, "top_k: out of range") != 0;
}
