/* nvrtc.h: the host calls of moe/ that NVRTC does not declare, since it compiles device code alone.
   A C compiler compares them with those of the toolkit's own cuda_runtime_api.h. */
#ifdef __CUDACC_RTC__
#include <cuda_runtime.h>
#define NVRTC_CALL extern __device__
#else
#include <cuda_runtime_api.h>
#define NVRTC_CALL extern
#endif

NVRTC_CALL cudaError_t cudaFuncSetAttribute(const void*, enum cudaFuncAttribute, int);
NVRTC_CALL cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
NVRTC_CALL cudaError_t cudaGetDriverEntryPoint(const char*, void**, unsigned long long,
                                               enum cudaDriverEntryPointQueryResult*);
NVRTC_CALL cudaError_t cudaEventCreate(cudaEvent_t*);
NVRTC_CALL cudaError_t cudaEventDestroy(cudaEvent_t);
NVRTC_CALL cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
NVRTC_CALL cudaError_t cudaEventSynchronize(cudaEvent_t);
NVRTC_CALL cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t);
NVRTC_CALL cudaError_t cudaMemset(void*, int, size_t);
NVRTC_CALL cudaError_t cudaMemcpy(void*, const void*, size_t, enum cudaMemcpyKind);
NVRTC_CALL cudaError_t cudaDeviceSynchronize(void);
NVRTC_CALL cudaError_t cudaSetDevice(int);
NVRTC_CALL cudaError_t cudaDeviceCanAccessPeer(int*, int, int);
NVRTC_CALL cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int);
NVRTC_CALL cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int,
                                                                     size_t);
NVRTC_CALL cudaError_t cudaDeviceGetPCIBusId(char*, int, int);
NVRTC_CALL cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*);
NVRTC_CALL cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned int);
NVRTC_CALL cudaError_t cudaIpcCloseMemHandle(void*);
NVRTC_CALL cudaError_t cudaStreamSynchronize(cudaStream_t);
NVRTC_CALL cudaError_t cudaStreamBeginCapture(cudaStream_t, enum cudaStreamCaptureMode);
NVRTC_CALL cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
NVRTC_CALL cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long);
NVRTC_CALL cudaError_t cudaGraphDestroy(cudaGraph_t);
NVRTC_CALL cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
NVRTC_CALL cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
