/* libcuda.so.1 for the real bindings: one device in host memory, work done at once.

   What a capture records is done when the graph is launched. `fake_books` says how much exists. */

#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef unsigned long long Address;
typedef void *Handle;
enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };

enum { CONTEXTS, STREAMS, EVENTS, DEVICE, HOST, GRAPHS, EXECUTABLES, KINDS };
static int books[KINDS], current, capturing, flags;
typedef struct { void *target; const void *source; size_t size; int value; } Operation;
typedef struct { Operation operations[64]; int count; } Graph;
static Graph *recorded;

int fake_books(int kind) { return books[kind]; }
int fake_current(void) { return current; }
int fake_flags(void) { return flags; }

static Status run(Operation o) {
  if (o.source) memcpy(o.target, o.source, o.size); else memset(o.target, o.value, o.size);
  return OK;
}
static Status put(Operation o) {
  if (!current) return INVALID_CONTEXT;
  if (!capturing) return run(o);
  recorded->operations[recorded->count++] = o;
  return OK;
}
static Status create(int kind, Handle *out, size_t size) {
  if (!current) return INVALID_CONTEXT;
  if (capturing) return CAPTURE_UNSUPPORTED;
  books[kind]++;
  *out = calloc(1, size);
  return OK;
}
static Status destroy(int kind, Handle handle) {
  if (!current || !handle) return INVALID_VALUE;
  books[kind]--;
  free(handle);
  return OK;
}

Status cuInit(unsigned f) { return f ? INVALID_VALUE : OK; }
Status cuDriverGetVersion(int *version) { *version = 12060; return OK; }
Status cuDeviceGet(int *device, int ordinal) { *device = ordinal; return OK; }
Status cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return device; }
Status cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : 0;
  return device;
}
Status cuDevicePrimaryCtxGetState(int d, unsigned *f, int *active) { *f = flags; *active = books[CONTEXTS]; return d; }
Status cuDevicePrimaryCtxSetFlags_v2(int d, unsigned f) { flags = f; return d; }
Status cuDevicePrimaryCtxRetain(Handle *context, int d) { books[CONTEXTS]++; *context = books; return d; }
Status cuDevicePrimaryCtxRelease_v2(int d) { books[CONTEXTS]--; return d; }
Status cuCtxPushCurrent_v2(Handle context) { if (context != books) return INVALID_CONTEXT; current++; return OK; }
Status cuCtxPopCurrent_v2(Handle *context) { if (!current) return INVALID_CONTEXT; current--; *context = books; return OK; }
Status cuStreamCreate(Handle *stream, unsigned f) { return f == 1 ? create(STREAMS, stream, 8) : INVALID_VALUE; }
Status cuStreamDestroy_v2(Handle stream) { return destroy(STREAMS, stream); }
Status cuStreamSynchronize(Handle stream) { return capturing || !stream ? CAPTURE_UNSUPPORTED : OK; }
Status cuEventCreate(Handle *event, unsigned f) { return f == 2 || f == 3 ? create(EVENTS, event, 8) : INVALID_VALUE; }
Status cuEventDestroy_v2(Handle event) { return destroy(EVENTS, event); }
Status cuEventRecord(Handle event, Handle stream) { return event && stream ? OK : INVALID_VALUE; }
Status cuEventSynchronize(Handle event) { return event ? OK : INVALID_VALUE; }
Status cuMemAlloc_v2(Address *address, size_t size) { return create(DEVICE, (Handle *)address, size); }
Status cuMemFree_v2(Address address) { return destroy(DEVICE, (Handle)address); }
Status cuMemHostAlloc(Handle *pointer, size_t size, unsigned f) { return f == 2 ? create(HOST, pointer, size) : INVALID_VALUE; }
Status cuMemFreeHost(Handle pointer) { return destroy(HOST, pointer); }
Status cuMemHostGetDevicePointer_v2(Address *address, Handle pointer, unsigned f) { *address = (Address)pointer; return f; }
Status cuMemsetD8Async(Address a, unsigned char value, size_t size, Handle s) { return s ? put((Operation){(void *)a, 0, size, value}) : INVALID_VALUE; }
Status cuMemcpyHtoDAsync_v2(Address t, const void *source, size_t size, Handle s) { return s ? put((Operation){(void *)t, source, size, 0}) : INVALID_VALUE; }
Status cuMemcpyDtoHAsync_v2(void *t, Address source, size_t size, Handle s) { return s ? put((Operation){t, (void *)source, size, 0}) : INVALID_VALUE; }
Status cuMemcpyDtoDAsync_v2(Address t, Address source, size_t size, Handle s) { return s ? put((Operation){(void *)t, (void *)source, size, 0}) : INVALID_VALUE; }
Status cuStreamBeginCapture_v2(Handle stream, int mode) {
  if (!stream || mode != 1) return INVALID_VALUE;
  create(GRAPHS, (Handle *)&recorded, sizeof(Graph));
  capturing = 1;
  return OK;
}
Status cuStreamEndCapture(Handle stream, Handle *graph) {
  if (!stream || !capturing) return INVALID_VALUE;
  capturing = 0;
  *graph = recorded;
  return OK;
}
Status cuGraphInstantiateWithFlags(Handle *executable, Handle graph, Address f) {
  Status status = f ? INVALID_VALUE : create(EXECUTABLES, executable, sizeof(Graph));
  if (!status) memcpy(*executable, graph, sizeof(Graph));
  return status;
}
Status cuGraphDestroy(Handle graph) { return destroy(GRAPHS, graph); }
Status cuGraphExecDestroy(Handle executable) { return destroy(EXECUTABLES, executable); }
Status cuGraphLaunch(Handle executable, Handle stream) {
  Graph *graph = executable;
  for (int i = 0; i < graph->count; i++) run(graph->operations[i]);
  return stream ? OK : INVALID_VALUE;
}

/* The bindings ask by name, and for calls on a stream of one thread's own too. */
void *dlsym(void *, const char *);
Status cuGetProcAddress_v2(const char *name, void **function, int version, Address f, int *found) {
  static const char *suffixes[] = {"_v2", "", "WithFlags"};
  char full[256];
  *function = 0;
  for (int i = 0; i < 3 && !*function && strlen(name) < 200; i++) {
    strcpy(full, name);
    strcat(full, suffixes[i]);
    *function = dlsym(0, full);
  }
  if (found) *found = *function ? 0 : 1;
  (void)version, (void)f;
  return *function ? OK : NOT_FOUND;
}
Status cuGetProcAddress(const char *name, void **function, int version, Address f) { return cuGetProcAddress_v2(name, function, version, f, 0); }
