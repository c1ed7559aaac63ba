// What the bindings see.
#pragma once

#include "cpu/isa.h"
#include "cpu/threads.h"
#include "cpu/update.h"
#include "cuda/device.h"
#include "group_update.h"
#include "plan.h"
#include "registry.h"
#include "torch_tensor.h"
