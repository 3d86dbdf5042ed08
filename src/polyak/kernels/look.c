/* Whether a model holds the tensors that it held, and whether they are where they were, in one call for each question.
 *
 * Of a tensor it is DLPack's C exchange API that is asked, which the tensor type hands out: a stable ABI that knows
 * neither Python nor torch, https://dmlc.github.io/dlpack/latest/c_api.html . Of a dict it is PyDict_Next, which the
 * caller hands in. Called with the interpreter's lock held.
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

#define HEAD 3    /* integers noted of each tensor, before its shape and strides */
#define SOON 8    /* tensors ahead that are asked for from memory: most of the time would be spent waiting for them */
#define IMPL 192  /* bytes of a tensor that are looked at, or a few more */
#define FIRST 256 /* bytes of its values that are asked for, for who reads them next */

/* Where a tensor is in memory, as far as that is known. Only asked for ahead, never read. */
struct hint {
    const char *impl, *storage;
};

static void ask_for(const void *object, struct hint hint) {
    __builtin_prefetch(object);
    for (int64_t i = 0; i <= IMPL; i += 64)
        __builtin_prefetch(hint.impl + i);
    __builtin_prefetch(hint.storage);
}

/* Whether `api` is of a version that is known here, and has what is needed. */
int64_t polyak_can_look(const struct exchange_api *api) { return api->major == 1 && api->from_object; }

/* Note in `notes` where the tensors are, or compare. Returns 1 for done or the same, 0 for not, -1 for an exception. */
int64_t polyak_look(const struct exchange_api *api, void *const *objects, const struct hint *hints, int64_t count,
                    int64_t *notes, int64_t compare) {
    for (int64_t i = 0; i < count; i++) {
        struct dl_tensor tensor;
        if (i + SOON < count)
            ask_for(objects[i + SOON], hints[i + SOON]);
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
        for (int64_t j = 0; j < FIRST; j += 64)
            __builtin_prefetch((const char *)head[0] + j);
        notes = strides + tensor.num_dims;
    }
    return 1;
}

/* PyDict_Next: gives the next key and value of a dict until there is none. */
typedef int next_item(void *dict, intptr_t *position, void **key, void **value);

/* Whether the dicts hold the same objects under the same keys, in the same order: `items` is a key and a value for each,
 * and 0 and 0 after each dict. */
int64_t polyak_same(next_item *next, void *const *dicts, int64_t count, void *const (*items)[2]) {
    for (int64_t i = 0; i < count; i++, items++) {
        intptr_t position = 0;
        void *key, *value;
        for (; next(dicts[i], &position, &key, &value); items++)
            if (key != (*items)[0] || value != (*items)[1])
                return 0;
        if ((*items)[0])
            return 0;
    }
    return 1;
}
