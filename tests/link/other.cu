/* other.cu: the second file of the link test; main.cu is the first. */
#include "everything.h"

moe_status link_run_other(float* y) { return link_layer(y); }
