/* Whether tensors are where they were, as they were, in one call for all.
 *
 * What is asked is DLPack's C exchange API, which the tensor type hands out: a stable ABI that knows neither Python nor
 * torch, https://dmlc.github.io/dlpack/latest/c_api.html . Called with the interpreter's lock held.
 */

#include <stdint.h>
#include <string.h>

struct dl_tensor {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t num_dims;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct exchange_api {
    uint32_t major, minor;
    void *older;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*from_object)(void *object, struct dl_tensor *out); /* 0, or an exception of Python's is set */
    void *current_stream;
};

#define HEAD 3 /* integers noted of each tensor, before its shape and strides */

/* Whether `api` is of a version that is known here, and has what is needed. */
int64_t polyak_can_look(const struct exchange_api *api) { return api->major == 1 && api->from_object; }

/* Note in `notes` where the tensors are, or compare. Returns 1 for done or the same, 0 for not, -1 for an exception. */
int64_t polyak_look(const struct exchange_api *api, void *const *objects, int64_t count, int64_t *notes,
                    int64_t compare) {
    for (int64_t i = 0; i < count; i++) {
        struct dl_tensor tensor;
        if (api->from_object(objects[i], &tensor))
            return -1;
        const size_t bytes = sizeof(int64_t) * (size_t)tensor.num_dims;
        int64_t head[HEAD] = {(int64_t)tensor.data + (int64_t)tensor.byte_offset};
        memcpy(&head[1], &tensor.device, sizeof head[1]);
        memcpy(&head[2], &tensor.num_dims, sizeof head[2]); /* and the dtype */
        int64_t *const shape = notes + HEAD, *const strides = shape + tensor.num_dims;
        if (!compare) {
            memcpy(notes, head, sizeof head);
            memcpy(shape, tensor.shape, bytes);
            memcpy(strides, tensor.strides, bytes);
        } else if (memcmp(notes, head, sizeof head) || memcmp(shape, tensor.shape, bytes) ||
                   memcmp(strides, tensor.strides, bytes))
            return 0;
        notes = strides + tensor.num_dims;
    }
    return 1;
}
