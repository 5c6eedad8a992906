import static org.junit.jupiter.api.Assertions.assertEquals;

import org.junit.jupiter.api.Test;
import org.openapitools.client.ApiClient;
import org.openapitools.client.api.OpenaiApi;
import org.openapitools.client.model.CompletionRequest;
import org.openapitools.client.model.Prompt;

class CallTest {
    @Test
    void call() throws Exception {
        var client = new ApiClient().setBasePath(System.getenv("ADDRESS"));
        var body = new CompletionRequest().prompt(new Prompt("Once")).maxTokens(4);
        var answer = new OpenaiApi(client).createCompletion(body);
        assertEquals("length", answer.getChoices().get(0).getFinishReason().getValue());
    }
}
