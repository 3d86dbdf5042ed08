/* Whether modules hold the same tensors as before, and whether these have the same addresses, all in one call.
 *
 * Called with the interpreter's lock held. The caller passes PyDict_Next and functions of torch's stable C interface,
 * so nothing of torch or Python is compiled in. It also keeps every dict, key and value alive, so that all reads are of
 * live objects.
 */

#include <stdint.h>
#include <string.h>

/* PyDict_Next: gives the next key and value of a dict until there is none. */
typedef int next_item(void *dict, intptr_t *position, void **key, void **value);

/* Functions of torch/csrc/inductor/aoti_torch/c/shim.h. They return 0 if they have an answer. */
struct questions {
    int (*data_ptr)(void *const *tensor, int64_t *answer);
    int (*dim)(void *const *tensor, int64_t *answer);
    int (*sizes)(void *const *tensor, const int64_t **answer);
    int (*strides)(void *const *tensor, const int64_t **answer);
    int (*dtype)(void *const *tensor, int32_t *answer);
    int (*device_type)(void *const *tensor, int32_t *answer);
    int (*device_index)(void *const *tensor, int32_t *answer);
    int (*storage_size)(void *const *tensor, int64_t *answer); /* in bytes: a storage may shrink under its tensors */
};

/* An entry of a dict. Zeros end a dict. `tensor` and `storage` are only compared and prefetched, never read: torch may
 * have freed them since. Both are 0 for what is no tensor. */
struct item {
    void *key;
    const char *value;
    const char *tensor, *storage;
};

#define HEAD 4    /* integers noted of each tensor, before its shape and strides */
#define SOON 12   /* items ahead to prefetch: otherwise most of the time goes into waiting for memory */
#define BYTES 192 /* of a tensor to prefetch */

static void prefetch(const struct item *item, int64_t handle_at) {
    if (!item->tensor)
        return;
    __builtin_prefetch(item->value + handle_at);
    for (int64_t i = 0; i <= BYTES; i += 64)
        __builtin_prefetch(item->tensor + i);
    __builtin_prefetch(item->storage);
}

/* Note the address and layout of a tensor, or compare them with the notes. Returns the end of its notes; 0 if they
 * differ or the Python object has another tensor now. */
static int64_t *check_tensor(const struct questions *of, const struct item *item, int64_t handle_at, int64_t *notes,
                             int64_t compare) {
    void *const *const handle = (void *const *)(item->value + handle_at);
    int64_t data, dim, bytes_held;
    const int64_t *sizes, *strides;
    int32_t dtype, type, index;
    if (*handle != item->tensor || of->data_ptr(handle, &data) || of->dim(handle, &dim) || of->sizes(handle, &sizes) ||
        of->strides(handle, &strides) || of->dtype(handle, &dtype) || of->device_type(handle, &type) ||
        of->device_index(handle, &index) || of->storage_size(handle, &bytes_held))
        return 0;
    const int64_t head[HEAD] = {data, dim << 32 | (uint32_t)dtype, (int64_t)type << 32 | (uint32_t)index, bytes_held};
    const size_t bytes = sizeof(int64_t) * (size_t)dim;
    if (!compare) {
        memcpy(notes, head, sizeof head);
        memcpy(notes + HEAD, sizes, bytes);
        memcpy(notes + HEAD + dim, strides, bytes);
    } else if (memcmp(notes, head, sizeof head) || memcmp(notes + HEAD, sizes, bytes) ||
               memcmp(notes + HEAD + dim, strides, bytes))
        return 0;
    return notes + HEAD + 2 * dim;
}

/* Note the tensors, or compare them with the notes; check that the dicts hold the same objects under the same keys in
 * the same order. Tensors that are in no dict come after the last dict. Returns 1 for noted or the same, else 0. */
int64_t polyak_fingerprint(next_item *next, const struct questions *of, int64_t handle_at, void *const *dicts,
                           int64_t num_dicts, const struct item *items, int64_t num_items, int64_t *notes,
                           int64_t compare) {
    const struct item *item = items, *const end = items + num_items;
    for (int64_t i = 0; i < num_dicts; i++, item++) {
        intptr_t position = 0;
        void *key, *value;
        for (; next(dicts[i], &position, &key, &value); item++) {
            if (end - item > SOON)
                prefetch(item + SOON, handle_at);
            /* A longer dict ends here too: zeros are no key. */
            if (key != item->key || value != item->value ||
                (item->tensor && !(notes = check_tensor(of, item, handle_at, notes, compare))))
                return 0;
        }
        if (item->value)
            return 0;
    }
    for (; item < end; item++)
        if (!(notes = check_tensor(of, item, handle_at, notes, compare)))
            return 0;
    return 1;
}
